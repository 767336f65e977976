//! Rounds in which the contestants take turns: A B C, A B C, …

use anyhow::{Context, Result};

use crate::stats::Series;

/// One contestant: a name, and a function that measures once.
pub struct Contestant<'a> {
    name: &'static str,
    measure: Box<dyn FnMut() -> Result<f64> + 'a>,
}

impl<'a> Contestant<'a> {
    /// Measures once at each call.
    pub fn new(name: &'static str, measure: impl FnMut() -> Result<f64> + 'a) -> Self {
        Contestant { name, measure: Box::new(measure) }
    }
}

/// Runs `rounds` rounds after one that only warms up. The series come back in the contestants' order.
///
/// # Errors
/// The first error of a contestant, with its name.
pub fn take_turns(rounds: usize, contestants: &mut [Contestant<'_>]) -> Result<Vec<Series>> {
    let mut series = vec![Series::default(); contestants.len()];
    for round in 0..=rounds {
        for (contestant, series) in contestants.iter_mut().zip(&mut series) {
            let value = (contestant.measure)().with_context(|| format!("measuring {}", contestant.name))?;
            if round > 0 {
                series.push(value);
            }
        }
    }
    Ok(series)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn turns_alternate_and_the_first_round_does_not_count() {
        let order = RefCell::new(String::new());
        let mut n = 0.0;
        let series = take_turns(
            2,
            &mut [
                Contestant::new("a", || {
                    order.borrow_mut().push('a');
                    n += 1.0;
                    Ok(n)
                }),
                Contestant::new("b", || {
                    order.borrow_mut().push('b');
                    Ok(7.0)
                }),
            ],
        )
        .unwrap();
        assert_eq!(order.into_inner(), "ababab");
        assert_eq!(series, [Series::new(vec![2.0, 3.0]), Series::new(vec![7.0, 7.0])]);
    }
}
