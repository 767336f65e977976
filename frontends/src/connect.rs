//! Why a device could not be connected.

use domain_kit::HvError;
use domain_kit::grants::GrantError;
use domain_kit::xs::XsError;

/// Why a device could not be connected. Names it as xenstore does: "vbd" or "vif", and its number.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// xenstore.
    #[error(transparent)]
    Store(#[from] XsError),
    /// hv-core.
    #[error(transparent)]
    Hypercall(#[from] HvError),
    /// Memory.
    #[error(transparent)]
    Grant(#[from] GrantError),
    /// The device's own nodes.
    #[error("{0} {1}: {2}")]
    Node(&'static str, u32, &'static str),
    /// The backend closed the device; its error node may say why.
    #[error("{0} {1}: the backend closed the device")]
    Closed(&'static str, u32),
}
