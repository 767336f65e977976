//! xenstored: the Xen store as a restartable service domain.
//!
//! ```text
//!  sockets ─┐              ┌────────── journal memory ───────────┐
//!  rings   ─┤ transport ──►│ slots: input, positions             │
//!           │      ▲       │ log:   snapshot, one record an event│
//!           └──────┘       └──────────▲──────────────────────────┘
//!   daemon (epoll)  ──►  engine ──────┘ ──►  store (state machine) ──► tree, watches, transactions
//! ```
//!
//! The store is a function of a sequence of events. The engine carries an event out, records it, and only then lets
//! its output be seen. A SIGKILL at any instant leaves the journal, from which the next process goes on. The README
//! says how to run it; `docs/architecture.md` of the project says where it stands in the whole.

pub mod calls;
pub mod codec;
pub mod daemon;
pub mod domains;
pub mod door;
pub mod engine;
pub mod journal;
pub mod keeper;
pub mod live;
pub mod migrate;
pub mod path;
pub mod perms;
pub mod store;
pub mod transport;
pub mod tree;
pub mod turns;
pub mod watches;
pub mod wire;
