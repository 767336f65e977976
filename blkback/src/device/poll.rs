//! How long a ring's thread looks for work before it sleeps.
//!
//! As KVM polls for halted processors: looking is worth while when work comes soon. The window grows when a sleep turned out to be
//! shorter than the longest window, and goes to nothing when one was longer: an idle ring costs no processor time.

use std::time::Duration;

/// Longest window: a frontend's turn-round, not a disk's.
const LONGEST: Duration = Duration::from_micros(20);
/// The window's first size.
const FIRST: Duration = Duration::from_micros(5);

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    now: Duration,
    longest: Duration,
}

impl Window {
    /// Closed. With one processor it stays closed: nobody could bring work meanwhile.
    pub fn new(processors: usize) -> Self {
        let longest = if processors > 1 { LONGEST } else { Duration::ZERO };
        Window { now: Duration::ZERO, longest }
    }

    /// For how long to look.
    pub fn get(&self) -> Duration {
        self.now
    }

    /// Work came after `idle`, looking and sleeping together.
    pub fn learn(&mut self, idle: Duration) {
        if idle > self.longest {
            self.now = Duration::ZERO;
        } else if idle > self.now {
            self.now = (self.now * 2).clamp(FIRST, self.longest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_for_quick_work_and_closes_for_slow() {
        let mut window = Window::new(2);
        assert_eq!(window.get(), Duration::ZERO);
        for _ in 0..4 {
            window.learn(Duration::from_micros(15));
        }
        assert_eq!(window.get(), LONGEST);
        window.learn(Duration::from_micros(3));
        assert_eq!(window.get(), LONGEST);
        window.learn(Duration::from_millis(1));
        assert_eq!(window.get(), Duration::ZERO);
    }

    #[test]
    fn one_processor_never_looks() {
        let mut window = Window::new(1);
        window.learn(Duration::from_nanos(1));
        assert_eq!(window.get(), Duration::ZERO);
    }
}
