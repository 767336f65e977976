//! The measuring side inside a process domain; see [`bench::guest`].

fn main() -> anyhow::Result<()> {
    bench::guest::run()
}
