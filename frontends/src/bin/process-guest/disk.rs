//! The disk of the load.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use domain_kit::Domain;
use domain_kit::xs::XsClient;
use frontends::blkfront::{BlkDisk, BlkFront};
use workload::load::BlockDevice;

/// Connects disk `id`.
///
/// # Errors
/// In words.
pub fn connect(
    domain: &Domain,
    xs: &XsClient,
    id: u32,
    timeout: Duration,
) -> anyhow::Result<Arc<dyn BlockDevice>> {
    let front = BlkFront::connect(&domain.hv, xs, domain.domid(), id, timeout)
        .with_context(|| format!("disk {id}"))?;
    Ok(Arc::new(BlkDisk::new(front)?))
}
