//! How long a thread looks for work before it sleeps.
//!
//! As KVM polls for halted processors: looking is worth while when work comes soon, for a sleep and a wake-up across processors cost
//! tens of microseconds in a virtual machine. The window grows when a sleep turned out to be shorter than the longest window,
//! shrinks to a half when one was longer, so that one slow answer among many does not put the others to sleep, and closes when one was
//! much longer: what is idle costs no processor time. It also closes for a while when the thread lost its processor while it looked:
//! somebody else has work to do there.

use std::time::{Duration, Instant};

/// The window's first size.
const FIRST: Duration = Duration::from_micros(5);
/// Between two looks at the clock nothing takes as long: the processor was taken away.
const TAKEN_AWAY: Duration = Duration::from_micros(200);
/// For so long it is left to others then.
const LEFT: Duration = Duration::from_millis(5);
/// What a sleep takes longer than the work took to come, about: the wake-up of another, halted processor.
const WAKE_UP: Duration = Duration::from_micros(30);
/// A sleep of so many times the longest window is that of somebody idle.
const IDLE: u32 = 8;
/// Glances for each look at the clock.
const GLANCES: u32 = 8;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    now: Duration,
    longest: Duration,
    left_until: Option<Instant>,
}

impl Window {
    /// Closed, and never longer than `longest`. With one processor it stays closed: nobody could bring work meanwhile.
    pub fn new(longest: Duration) -> Self {
        Self::on(std::thread::available_parallelism().map_or(1, usize::from), longest)
    }

    fn on(processors: usize, longest: Duration) -> Self {
        let longest = if processors > 1 { longest } else { Duration::ZERO };
        Window { now: Duration::ZERO, longest, left_until: None }
    }

    /// For how long to look.
    pub fn get(&self) -> Duration {
        self.now
    }

    /// Whether there will be any looking.
    pub fn is_open(&self) -> bool {
        !self.now.is_zero()
    }

    /// Looks for as long as is worth while; true as soon as `ready` says so, which is cheap and asked often. `since` is now.
    ///
    /// # Errors
    /// What `ready` gives.
    pub fn look<E>(&mut self, since: Instant, mut ready: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
        let mut last = since;
        loop {
            for _ in 0..GLANCES {
                if ready()? {
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            if !self.is_open() {
                return Ok(false);
            }
            let now = Instant::now();
            if now - last >= TAKEN_AWAY {
                self.left_until = Some(now + LEFT);
                self.now = Duration::ZERO;
            }
            last = now;
            if now - since >= self.now {
                return Ok(false);
            }
        }
    }

    /// Work came after `idle`, looking and sleeping together.
    pub fn learn(&mut self, idle: Duration) {
        if idle <= self.now {
            return;
        }
        if idle > self.longest * IDLE {
            self.now = Duration::ZERO;
        } else if idle.saturating_sub(WAKE_UP) > self.longest {
            let half = self.now / 2;
            self.now = if half < FIRST { Duration::ZERO } else { half };
        } else {
            if let Some(until) = self.left_until {
                if Instant::now() < until {
                    return;
                }
                self.left_until = None;
            }
            self.now = (self.now * 2).clamp(FIRST.min(self.longest), self.longest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_micros(20);

    #[test]
    fn grows_while_work_comes_soon_and_closes_when_it_does_not() {
        let mut window = Window::on(2, LONGEST);
        assert!(!window.is_open());
        window.learn(Duration::from_micros(15));
        assert_eq!(window.get(), FIRST);
        for _ in 0..4 {
            window.learn(Duration::from_micros(15));
        }
        assert_eq!(window.get(), LONGEST);
        window.learn(Duration::from_micros(3));
        assert_eq!(window.get(), LONGEST);
        window.learn(Duration::from_millis(1));
        assert!(!window.is_open());
    }

    #[test]
    fn one_slow_answer_does_not_close_it_and_several_do() {
        let slow = LONGEST + WAKE_UP + Duration::from_micros(10);
        let mut window = Window::on(2, LONGEST);
        // A sleep seems longer than it needed to be.
        (0..3).for_each(|_| window.learn(LONGEST + WAKE_UP));
        assert_eq!(window.get(), LONGEST);
        window.learn(slow);
        assert_eq!(window.get(), LONGEST / 2);
        window.learn(LONGEST);
        assert_eq!(window.get(), LONGEST);
        (0..3).for_each(|_| window.learn(slow));
        assert!(!window.is_open());
    }

    #[test]
    fn one_processor_never_looks() {
        let mut window = Window::on(1, LONGEST);
        window.learn(Duration::from_nanos(1));
        assert!(!window.is_open());
    }

    #[test]
    fn looking_ends_with_the_window_or_with_work() {
        let mut window = Window::on(2, Duration::from_millis(50));
        (0..20).for_each(|_| window.learn(Duration::from_millis(50)));
        let mut asked = 0;
        let found = window.look(Instant::now(), || {
            asked += 1;
            Ok::<_, ()>(asked == 3)
        });
        assert_eq!((found, asked), (Ok(true), 3));
        let start = Instant::now();
        assert_eq!(window.look(start, || Ok::<_, ()>(false)), Ok(false));
        // Less only if the processor was taken away.
        assert!(start.elapsed() >= Duration::from_millis(50) || !window.is_open());
        assert_eq!(window.look(Instant::now(), || Err(7)), Err(7));
    }

    #[test]
    fn a_lost_processor_closes_it_for_a_while() {
        let mut window = Window::on(2, Duration::from_secs(1));
        (0..20).for_each(|_| window.learn(Duration::from_millis(900)));
        let found = window.look(Instant::now(), || {
            std::thread::sleep(TAKEN_AWAY);
            Ok::<_, ()>(false)
        });
        assert_eq!(found, Ok(false));
        window.learn(FIRST);
        assert!(!window.is_open());
        std::thread::sleep(LEFT);
        window.learn(FIRST);
        assert!(window.is_open());
    }
}
