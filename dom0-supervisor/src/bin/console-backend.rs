//! The console domain: see `dom0_supervisor::console`. hv-core starts it; not to be started by hand.

fn main() -> anyhow::Result<()> {
    dom0_supervisor::console::run()
}
