//! Live update (see [`crate::live`]).

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};

use super::{Daemon, DaemonError, Link};
use crate::domains::Domains;
use crate::keeper::FdKeeper;
use crate::live::{Handover, Plan, Started, Step};
use crate::migrate::{self, Sources};
use crate::store::ConnId;

impl<K: FdKeeper, D: Domains> Daemon<K, D> {
    /// CONTROL live-update, the next request of this connection.
    pub(super) fn live_update(&mut self, id: ConnId) -> Result<(), DaemonError> {
        let args: Vec<Vec<u8>> = self.engine.live_request().into_iter().map(<[u8]>::to_vec).collect();
        let answer = match self.live.step(id, &args, &*self.successor) {
            Step::Answer(answer) => answer,
            Step::Start if self.engine.take_live_mark(id) => Ok("OK".to_owned()),
            Step::Start => match self.live.take(id) {
                None => Ok("Not in live-update session.".to_owned()),
                Some(plan) => match self.hand_over(id, &plan)? {
                    None => return Ok(()),
                    Some(failed) => Ok(failed),
                },
            },
        };
        if self.engine.answer(id, answer.as_deref().map_err(|e| *e)).is_err() {
            self.stalled = true;
        }
        self.wake(id);
        self.flush_touched()
    }

    /// Starts the other binary. What it says if that fails.
    fn hand_over(&mut self, id: ConnId, plan: &Plan) -> Result<Option<String>, DaemonError> {
        // With no event to run again, the binary may carry requests out differently.
        if let Err(e) = self.engine.compact() {
            return Ok(Some(format!("The journal could not be compacted: {e}")));
        }
        tracing::info!(file = %plan.file.display(), "live update");
        self.engine.mark_live(id);
        let sockets: Vec<(ConnId, BorrowedFd<'_>)> = self
            .links
            .iter()
            .filter_map(|(id, link)| match link {
                Link::Socket { fd, .. } => Some((*id, fd.as_fd())),
                Link::Ring(_) => None,
            })
            .collect();
        let listener = self.listener.as_ref().map(|l| l.as_fd());
        let engine = &self.engine;
        let stream = plan.stream.map(|version| {
            let number = |fd: BorrowedFd<'_>| fd.as_raw_fd().cast_unsigned();
            let socket = |id| sockets.iter().find(|(which, _)| *which == id).map(|(_, fd)| number(*fd));
            let listener = listener.map(number);
            let sources = Sources { input: &|id| engine.unread_input(id), socket: &socket, listener };
            migrate::export(&engine.store, version, &sources)
        });
        let handover = Handover { plan, asking: id, listener, sockets: &sockets, stream: stream.as_deref() };
        match self.successor.start(&handover) {
            Started::Replaced => {
                self.replaced = true;
                Ok(None)
            }
            Started::Failed(why) => {
                self.engine.take_live_mark(id);
                tracing::error!(why, "live update failed; this process goes on");
                Ok(Some(why))
            }
        }
    }
}
