//! A disk's frontend, medium and fate.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    fuzz::block::device(input);
});
