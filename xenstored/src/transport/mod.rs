//! Moving bytes between connections and their journal slots.
#![forbid(unsafe_code)]

pub mod ring;
pub mod stream;

/// What an attempt to take input ended with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pulled {
    /// There is new input.
    Data,
    /// Nothing is there, or no room for it.
    Nothing,
    /// The client is gone.
    End,
}

/// What an attempt to hand over output ended with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    /// All is handed over.
    All,
    /// The client has to make room first.
    Blocked,
    /// The client is gone.
    End,
}
