//! xenbus: how the two ends of a device find each other in xenstore and agree on their states (`io/xenbus.h`).
//!
//! ```text
//!   /local/domain/<be>/backend/<kind>/<fe>/<id>/   frontend, frontend-id, online, state, features   (the backend writes)
//!   /local/domain/<fe>/device/<kind>/<id>/         backend, backend-id, state, rings, ports         (the frontend writes)
//! ```
//!
//! [`Backend`] runs a backend's devices; [`Frontend`] is one device seen from a frontend. The states of a backend:
//!
//! ```text
//!   Initialising ──offer──► InitWait ──frontend Initialised: connect──► Connected
//!        ▲                     ▲                                           │
//!        │                     │ frontend Initialising                     │ frontend Closing: disconnect
//!        │                     │ (connects again)                          ▼
//!     (toolstack)              └──────────── Closed ◄── frontend Closed ── Closing
//! ```
//!
//! One thread owns all transitions; what is done in each situation is one table, `decide`. A backend that was killed
//! finds its state node at Connected and no ring served: it attaches again without touching a state node, so its frontend
//! notices nothing.

mod backend;
mod decide;
mod frontend;
mod nodes;

pub use backend::{Backend, BackendDriver, BackendHandle, DeviceError, Properties};
pub use frontend::Frontend;
pub use nodes::{DeviceKey, DeviceNode, VHOST_USER, connect_store};

pub use xen_abi::xenbus::XenbusState;
