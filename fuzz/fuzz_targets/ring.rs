//! A guest's doings in its ring page.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    fuzz::targets::ring(input);
});
