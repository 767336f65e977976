//! Verified disk and network load shared by guests, the demo and the tests
