//! A slot of blkif's ring.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    fuzz::block::request(input);
});
