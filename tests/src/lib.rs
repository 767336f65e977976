//! Whole-system tests with the real binaries
