//! The grant table under a guest that changes it at any moment.

use std::cell::{Cell, RefCell};

use super::*;

const ME: u16 = 3;
const OTHER: u16 = 4;

fn entry(flags: u16, domid: u16) -> u32 {
    u32::from(domid) << 16 | u32::from(flags)
}

/// What a guest does to an entry between two accesses of hv-core's.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Guest {
    Nothing,
    /// Withdraws it as Linux does (gnttab_end_foreign_access_ref_v1): only while it is not in use, else it must wait.
    EndAccess,
    /// Grants it to us, writable.
    Grant,
    /// Grants it to us read-only, as Linux would with a free entry; a rude guest does so at any time.
    GrantReadOnly,
    /// Grants it to another.
    GrantOther,
    /// Clears everything, in-use bits too: rude.
    Wipe,
}

const GUEST: [Guest; 6] =
    [Guest::Nothing, Guest::EndAccess, Guest::Grant, Guest::GrantReadOnly, Guest::GrantOther, Guest::Wipe];

/// An entry whose guest plays a script: one action before each access.
struct Scripted<'a> {
    word: Cell<u32>,
    script: RefCell<std::slice::Iter<'a, Guest>>,
}

impl Scripted<'_> {
    fn act(&self) {
        let in_use = self.word.get() as u16 & (GTF_READING | GTF_WRITING);
        let new = match self.script.borrow_mut().next() {
            None | Some(Guest::Nothing) => return,
            Some(Guest::EndAccess) if in_use != 0 => return,
            Some(Guest::EndAccess | Guest::Wipe) => 0,
            Some(Guest::Grant) => entry(GTF_PERMIT_ACCESS | in_use, ME),
            Some(Guest::GrantReadOnly) => entry(GTF_PERMIT_ACCESS | GTF_READONLY | in_use, ME),
            Some(Guest::GrantOther) => entry(GTF_PERMIT_ACCESS | in_use, OTHER),
        };
        self.word.set(new);
    }
}

impl EntryWord for Scripted<'_> {
    fn load(&self) -> u32 {
        self.act();
        self.word.get()
    }
    fn swap_if(&self, old: u32, new: u32) -> Result<(), u32> {
        self.act();
        if self.word.get() != old {
            return Err(self.word.get());
        }
        // The moment of the pin: what it rests on is exactly what is there.
        assert!(allows(old, (new >> 16) as u16, new as u16 & GTF_WRITING != 0), "pinned {old:#x}");
        self.word.set(new);
        Ok(())
    }
    fn clear(&self, bits: u32) {
        self.act();
        self.word.set(self.word.get() & !bits);
    }
}

/// Every script of six guest actions, over: pin for reading, pin for writing, unpin both, in each order of kinds. Shows: a pin
/// is only ever set by one compare-and-swap from an entry that allows it; with a polite guest in-use bits are set exactly
/// while there is a pin; counts never go wrong; a rude guest only harms what is its own.
#[test]
fn xsa_224_pin_counts_for_every_guest_script() {
    let mut scripts = 0u32;
    let mut granted = 0u32;
    let n = GUEST.len();
    for code in 0..n.pow(6) {
        let script: Vec<Guest> = (0..6).map(|i| GUEST[code / n.pow(i) % n]).collect();
        let rude = script.iter().any(|a| !matches!(a, Guest::Nothing | Guest::EndAccess));
        for writes in [[false, false], [false, true], [true, false], [true, true]] {
            let word = Scripted {
                word: Cell::new(entry(GTF_PERMIT_ACCESS, ME)),
                script: RefCell::new(script.iter()),
            };
            let mut pins = Pins::default();
            let mut held = Vec::new();
            for write in writes {
                if let Ok(page) = pins.pin(9, &word, ME, write, || Some(4096)) {
                    assert_eq!(page, 4096);
                    held.push(write);
                    granted += 1;
                    let bits = word.word.get() as u16;
                    if !rude {
                        assert!(bits & GTF_READING != 0 && (!write || bits & GTF_WRITING != 0));
                    }
                }
                assert_eq!(
                    pins.pin(9, &word, OTHER, false, || Some(0)).is_ok(),
                    false_unless_others(&word, &held, &mut pins)
                );
            }
            assert_eq!(pins.len(), usize::from(!held.is_empty()));
            for (i, write) in held.iter().enumerate() {
                pins.unpin(9, &word, *write);
                let left = &held[i + 1..];
                assert_eq!(pins.len(), usize::from(!left.is_empty()));
                if !rude {
                    let bits = word.word.get() as u16;
                    assert_eq!(bits & GTF_READING != 0, !left.is_empty(), "{script:?}");
                    assert_eq!(bits & GTF_WRITING != 0, left.contains(&true), "{script:?}");
                }
            }
            scripts += 1;
        }
    }
    assert_eq!(scripts, 4 * 6u32.pow(6));
    assert!(granted > scripts / 4, "the scripts leave something to pin: {granted}");
}

/// Another domain pins the entry only if nobody else has and the guest granted it to that domain; then that pin ends at once.
fn false_unless_others(word: &Scripted<'_>, held: &[bool], pins: &mut Pins) -> bool {
    let mine = pins.0.get(&9).is_some_and(|a| a.domid == OTHER);
    if mine {
        assert!(held.is_empty(), "two domains share an entry");
        pins.unpin(9, word, false);
    }
    mine
}

fn pvh() -> Pvh {
    Pvh::new(4 << 20, 1).unwrap()
}

fn set(pvh: &Pvh, gref: u32, flags: u16, domid: u16, frame: u32) {
    let at = u64::from(gref) * 8;
    pvh.table.word(at + 4).unwrap().store(frame, Ordering::Relaxed);
    pvh.table.word(at).unwrap().store(entry(flags, domid), Ordering::Release);
}

fn flags(pvh: &Pvh, gref: u32) -> u16 {
    pvh.table.word(u64::from(gref) * 8).unwrap().load(Ordering::Acquire) as u16
}

#[test]
fn xsa_18_references_out_of_range() {
    let pvh = pvh();
    for gref in [512, 513, 1 << 29, u32::MAX, u32::MAX / 8] {
        assert_eq!(pvh.pin(gref, ME, false), Err(GNTST_BAD_GNTREF), "{gref}");
    }
    for gref in [0, 511] {
        assert_eq!(pvh.pin(gref, ME, false), Err(GNTST_GENERAL_ERROR), "an empty entry");
    }
    assert_eq!(pvh.pinned(), 0);
}

#[test]
fn xsa_226_transitive_and_transfer_entries_are_refused() {
    let pvh = pvh();
    for kind in [GTF_INVALID, GTF_ACCEPT_TRANSFER, GTF_TRANSITIVE] {
        set(&pvh, 8, kind, ME, 1);
        assert_eq!(pvh.pin(8, ME, false), Err(GNTST_GENERAL_ERROR));
        assert_eq!(flags(&pvh, 8), kind, "untouched");
    }
}

#[test]
fn frames_outside_of_ram_leave_no_pin() {
    let pvh = pvh();
    // 4 MiB are frames 0 to 1023; the hole, the start of high memory and the top are not RAM.
    for frame in [1024, 0xc_0000, 0xf_ffff, 0x10_0000, u32::MAX] {
        set(&pvh, 8, GTF_PERMIT_ACCESS, ME, frame);
        assert_eq!(pvh.pin(8, ME, true), Err(GNTST_BAD_PAGE), "{frame:#x}");
        assert_eq!(flags(&pvh, 8), GTF_PERMIT_ACCESS);
    }
    set(&pvh, 8, GTF_PERMIT_ACCESS, ME, 1023);
    assert_eq!(pvh.pin(8, ME, true), Ok(1023 * 4096));
}

#[test]
fn high_memory_lies_behind_low_memory() {
    let mut pvh = pvh();
    pvh.info.ram_bytes = 5 << 30;
    pvh.info.low_bytes = LOW_RAM_MAX;
    assert_eq!(pvh.frame_offset(0xb_ffff), Some(LOW_RAM_MAX - 4096));
    assert_eq!(pvh.frame_offset(0xc_0000), None);
    assert_eq!(pvh.frame_offset(0xf_ffff), None);
    assert_eq!(pvh.frame_offset(0x10_0000), Some(LOW_RAM_MAX));
    assert_eq!(pvh.frame_offset(0x17_ffff), Some((5 << 30) - 4096));
    assert_eq!(pvh.frame_offset(0x18_0000), None);
}

#[test]
fn a_pinned_entry_keeps_its_first_page() {
    let pvh = pvh();
    set(&pvh, 8, GTF_PERMIT_ACCESS, ME, 5);
    assert_eq!(pvh.pin(8, ME, true), Ok(5 * 4096));
    pvh.table.word(8 * 8 + 4).unwrap().store(77, Ordering::Relaxed);
    assert_eq!(pvh.pin(8, ME, false), Ok(5 * 4096), "the page of the first pin");
    assert_eq!(pvh.pin(8, OTHER, false), Err(GNTST_GENERAL_ERROR));
    pvh.unpin(8, true);
    assert_eq!(flags(&pvh, 8), GTF_PERMIT_ACCESS | GTF_READING);
    pvh.unpin(8, false);
    assert_eq!(flags(&pvh, 8), GTF_PERMIT_ACCESS);
    assert_eq!(pvh.pin(8, ME, false), Ok(77 * 4096));
}

#[test]
fn read_only_entries_are_read_only() {
    let pvh = pvh();
    set(&pvh, 8, GTF_PERMIT_ACCESS | GTF_READONLY, ME, 5);
    assert_eq!(pvh.pin(8, ME, true), Err(GNTST_GENERAL_ERROR));
    assert_eq!(pvh.pin(8, ME, false), Ok(5 * 4096));
    assert_eq!(pvh.pin(8, ME, true), Err(GNTST_GENERAL_ERROR), "also when it is pinned for reading");
    pvh.unpin(8, false);
    assert_eq!(flags(&pvh, 8), GTF_PERMIT_ACCESS | GTF_READONLY);
}

/// Threads pin and unpin one entry while its guest waits for a moment at which it is free: it never sees one too early.
#[test]
fn xsa_218_pins_race() {
    use std::sync::atomic::AtomicI32;
    let pvh = pvh();
    set(&pvh, 8, GTF_PERMIT_ACCESS, ME, 5);
    let in_use = AtomicI32::new(0);
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (pvh, in_use) = (&pvh, &in_use);
            scope.spawn(move || {
                for i in 0..20_000 {
                    let write = (i + thread) % 2 == 0;
                    if pvh.pin(8, ME, write).is_ok() {
                        in_use.fetch_add(1, Ordering::SeqCst);
                        in_use.fetch_sub(1, Ordering::SeqCst);
                        pvh.unpin(8, write);
                    }
                }
            });
        }
        scope.spawn(|| {
            let word = pvh.table.word(64).unwrap();
            for _ in 0..20_000 {
                let free = entry(GTF_PERMIT_ACCESS, ME);
                // As Linux: withdraw only from exactly "granted and not in use".
                if word.compare_exchange(free, 0, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                    assert_eq!(in_use.load(Ordering::SeqCst), 0, "withdrawn while in use");
                    word.store(free, Ordering::Release);
                }
            }
        });
    });
    assert_eq!(pvh.pinned(), 0);
    assert_eq!(flags(&pvh, 8), GTF_PERMIT_ACCESS);
}
