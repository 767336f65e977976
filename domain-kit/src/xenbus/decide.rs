//! What a backend does in each situation.

use xen_abi::xenbus::XenbusState::{self, *};

/// What to do with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Nothing: it is the frontend's turn, or the toolstack's.
    Wait,
    /// Publish features, then InitWait.
    Offer,
    /// Connect to the frontend's rings, then Connected.
    Connect,
    /// Serve again, after an own restart, what the state nodes say is connected.
    Reattach,
    /// Stop serving, forget what was kept, then this state (InitWait by way of an offer).
    Disconnect(XenbusState),
    /// Nothing is served: just say so.
    Say(XenbusState),
    /// Look at the nodes of a served device again, then say so.
    Refresh(XenbusState),
}

/// `back` and `front`: the state nodes; `live`: this process serves the device; `online`: the toolstack wants it.
pub(super) fn decide(back: XenbusState, front: XenbusState, live: bool, online: bool) -> Action {
    match (front, back) {
        // The frontend says goodbye, or is gone.
        (Closing, _) if live => Action::Disconnect(Closing),
        (Closing, Closing | Closed | Unknown) => Action::Wait,
        (Closing, _) => Action::Disconnect(Closing),
        (Closed | Unknown, _) if live => Action::Disconnect(Closed),
        (Closed | Unknown, Closed | Unknown | Initialising) => Action::Wait,
        (Closed | Unknown, _) => Action::Disconnect(Closed),
        // It begins, or begins again.
        (Initialising | InitWait, _) if live => Action::Disconnect(InitWait),
        (Initialising | InitWait, InitWait) => Action::Wait,
        (Initialising | InitWait, Closing) if !online => Action::Say(Closed),
        (Initialising | InitWait, Closed) if !online => Action::Wait,
        (Initialising | InitWait, Connected | Closing | Closed) => Action::Disconnect(InitWait),
        (Initialising | InitWait, _) => Action::Offer,
        // It changes something while it is connected.
        (Reconfiguring, Connected) if live => Action::Refresh(Reconfigured),
        (Connected, Reconfigured) if live => Action::Refresh(Connected),
        // It has rings.
        (_, _) if live => Action::Wait,
        (_, Reconfigured) => Action::Reattach,
        (_, Connected | Closing) => Action::Reattach,
        (_, InitWait | Initialised) => Action::Connect,
        (_, Closed) => Action::Wait,
        (_, _) => Action::Offer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [XenbusState; 9] = [
        Unknown,
        Initialising,
        InitWait,
        Initialised,
        Connected,
        Closing,
        Closed,
        Reconfiguring,
        Reconfigured,
    ];

    #[test]
    fn the_usual_way_up_and_down() {
        assert_eq!(decide(Initialising, Initialising, false, true), Action::Offer);
        assert_eq!(decide(InitWait, Initialising, false, true), Action::Wait);
        assert_eq!(decide(InitWait, Initialised, false, true), Action::Connect);
        assert_eq!(decide(Connected, Connected, true, true), Action::Wait);
        assert_eq!(decide(Connected, Connected, false, true), Action::Reattach);
        assert_eq!(decide(Connected, Closing, true, true), Action::Disconnect(Closing));
        assert_eq!(decide(Closing, Closed, false, true), Action::Disconnect(Closed));
        assert_eq!(decide(Closed, Initialising, false, true), Action::Disconnect(InitWait));
        assert_eq!(decide(Closed, Initialising, false, false), Action::Wait);
    }

    #[test]
    fn a_failed_device_is_left_alone_until_the_frontend_begins_again() {
        assert_eq!(decide(Closed, Connected, false, true), Action::Wait);
        assert_eq!(decide(Closed, Initialised, false, true), Action::Wait);
    }

    /// No cycle without the frontend: from every situation the backend's own actions end in waiting.
    #[test]
    fn every_situation_settles() {
        for front in ALL {
            for back in ALL {
                for live in [false, true] {
                    for online in [false, true] {
                        let (mut b, mut l) = (back, live);
                        let settled = (0..4).any(|_| {
                            match decide(b, front, l, online) {
                                Action::Wait => return true,
                                Action::Offer => b = InitWait,
                                Action::Connect => (b, l) = (Connected, true),
                                Action::Reattach => l = true,
                                Action::Disconnect(to) => (b, l) = (to, false),
                                Action::Say(to) | Action::Refresh(to) => b = to,
                            }
                            false
                        });
                        assert!(settled, "front {front:?} back {back:?} live {live} online {online}");
                    }
                }
            }
        }
    }
}
