//! Conversations of frontends that say anything.
use std::io::Write;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::super::wire::talk;
use super::*;

/// Says which rings it was told to serve and to end.
#[derive(Default)]
struct Seen {
    started: usize,
    stopped: usize,
}

impl Device for Seen {
    fn features(&self) -> u64 {
        super::super::F_VERSION_1
    }
    fn queues(&self) -> u16 {
        2
    }
    fn config(&self) -> Option<Vec<u8>> {
        Some(vec![7; 60])
    }
    fn inflight(&self) -> bool {
        true
    }
    fn start(&mut self, _ring: Ring) -> Result<(), String> {
        self.started += 1;
        Ok(())
    }
    fn stop(&mut self, _index: u16) -> Option<u16> {
        self.stopped += 1;
        Some(0)
    }
}

fn heard(stream: UnixStream, device: &mut Seen) -> Result<(), String> {
    serve(&mut talk(stream)?, device, false, || {})
}

/// A frontend that says anything, in messages that look like such or not even that: the conversation ends, and no ring goes on.
#[test]
fn garbage_ends_the_conversation() {
    let mut broken = 0;
    for seed in 0..500 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut bytes = Vec::new();
        for _ in 0..rng.random_range(1..20) {
            let size: u32 =
                *[0, 4, 8, 12, 40, rng.random_range(0..5000)].get(rng.random_range(0..6)).unwrap();
            bytes.extend(rng.random_range(0u32..45).to_le_bytes());
            // Version 1, now and then with NEED_REPLY, or anything.
            let flags = [1, 9, rng.random()][rng.random_range(0..3)];
            bytes.extend(u32::to_le_bytes(flags));
            bytes.extend(size.to_le_bytes());
            bytes.extend((0..size).map(|_| if rng.random_range(0..3) > 0 { 0 } else { rng.random::<u8>() }));
        }
        theirs.write_all(&bytes).unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        let mut device = Seen::default();
        broken += usize::from(heard(ours, &mut device).is_err());
        assert_eq!(device.started, device.stopped, "seed {seed}");
    }
    assert!(broken > 100, "{broken} of 500 were told to be wrong");
}

fn message(request: u32, body: &[u32]) -> Vec<u8> {
    let words = [request, 1, 4 * body.len() as u32];
    words.iter().chain(body).flat_map(|w| w.to_ne_bytes()).collect()
}

/// What the other end sends, then its end.
fn hear(messages: &[Vec<u8>]) -> Result<(), String> {
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    messages.iter().for_each(|m| theirs.write_all(m).unwrap());
    drop(theirs);
    heard(ours, &mut Seen::default())
}

const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const ENABLE: u32 = 18;

#[test]
fn queues_are_enabled_before_features_are_taken() {
    let agreed = message(SET_FEATURES, &[1 << 30, 1]);
    let early = [message(SET_OWNER, &[]), message(ENABLE, &[0, 1]), message(ENABLE, &[1, 1]), agreed];
    assert_eq!(hear(&early), Ok(()));
    let none_such = hear(&[message(SET_OWNER, &[]), message(ENABLE, &[7, 1])]);
    assert!(none_such.is_err(), "there is no queue 7");
}
