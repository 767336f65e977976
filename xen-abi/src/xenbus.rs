//! `io/xenbus.h`: the states of a device's two ends, stored as decimal text in their `state` nodes.

wire_enum! { "io/xenbus.h";
    /// State of a frontend or a backend.
    pub enum XenbusState: u32 {
        /// The node does not exist.
        Unknown(XenbusStateUnknown) = 0,
        Initialising(XenbusStateInitialising) = 1,
        /// The backend has published what it offers and waits for the frontend.
        InitWait(XenbusStateInitWait) = 2,
        /// The frontend has published its rings and ports.
        Initialised(XenbusStateInitialised) = 3,
        Connected(XenbusStateConnected) = 4,
        /// The device is going away or an end has failed.
        Closing(XenbusStateClosing) = 5,
        Closed(XenbusStateClosed) = 6,
        Reconfiguring(XenbusStateReconfiguring) = 7,
        Reconfigured(XenbusStateReconfigured) = 8,
    }
}

impl XenbusState {
    /// The state in a node's text. Text that is no known state is [`XenbusState::Unknown`], as Linux reads it.
    pub fn parse(text: &str) -> Self {
        text.trim().parse().ok().and_then(Self::from_raw).unwrap_or(Self::Unknown)
    }

    /// The node's text.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "0",
            Self::Initialising => "1",
            Self::InitWait => "2",
            Self::Initialised => "3",
            Self::Connected => "4",
            Self::Closing => "5",
            Self::Closed => "6",
            Self::Reconfiguring => "7",
            Self::Reconfigured => "8",
        }
    }
}
