//! The disk of the load.

use std::sync::Arc;
use std::time::Duration;

use domain_kit::Domain;
use domain_kit::xs::XsClient;
use workload::load::BlockDevice;

/// Connects disk `id`.
///
/// # Errors
/// In words.
pub fn connect(
    _domain: &Domain,
    _xs: &XsClient,
    id: u32,
    _timeout: Duration,
) -> anyhow::Result<Arc<dyn BlockDevice>> {
    anyhow::bail!("disk {id}: no block frontend in this build")
}
