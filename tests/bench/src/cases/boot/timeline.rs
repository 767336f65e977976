//! Where the time of a boot goes.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::report::{Goal, Line};
use crate::stats::Series;

/// Seconds in a day.
const DAY: f64 = 86_400.0;
/// What hv-vcpu logs when it lets the guest run.
const STARTS: &str = "the guest starts";

/// Phases of boots, seconds each. The first three are ours alone.
#[derive(Debug, Default)]
pub struct Timeline {
    runner: Series,
    vm: Series,
    load: Series,
    before: Series,
    kernel: Series,
}

/// What hv-vcpu tells of its start: seconds, and the time of day when the guest started.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Runner {
    starts: f64,
    vm: f64,
    load: f64,
}

impl Runner {
    /// From a runner's log: its last start.
    pub fn from_log(log: &str) -> Option<Runner> {
        let line = log.lines().rev().find(|l| l.contains(STARTS))?;
        let stamp = line.split_whitespace().find_map(|word| word.strip_suffix('Z')?.split_once('T'))?.1;
        let mut starts = 0.0;
        for part in stamp.split(':') {
            starts = starts * 60.0 + part.parse::<f64>().ok()?;
        }
        let seconds = |key: &str| {
            let value = line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))?;
            Some(value.parse::<f64>().ok()? / 1000.0)
        };
        Some(Runner { starts, vm: seconds("vm_ms")?, load: seconds("load_ms")? })
    }
}

/// Seconds since midnight (UTC), as logs tell the time.
pub fn time_of_day() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64() % DAY)
}

impl Timeline {
    /// One boot of `total` seconds, whose kernel had run `kernel` seconds when its first process began. Of ours also the time of day
    /// when it was asked for, and what the runner told.
    pub fn push(&mut self, total: f64, kernel: f64, ours: Option<(f64, Runner)>) {
        let mut before = total - kernel;
        if let Some((began, runner)) = ours {
            let until_runner = (runner.starts - began).rem_euclid(DAY) - runner.vm - runner.load;
            self.runner.push(until_runner);
            self.vm.push(runner.vm);
            self.load.push(runner.load);
            before -= until_runner + runner.vm + runner.load;
        }
        self.before.push(before);
        self.kernel.push(kernel);
    }

    /// The phases, ours beside QEMU's.
    pub fn lines(&self, microvm: &Timeline) -> Vec<Line> {
        let alone = |name: &str, series: &Series, note: &str| Line {
            name: format!("- {name}"),
            unit: "s".into(),
            ours: Some(series.median()),
            samples: series.len(),
            note: note.into(),
            ..Line::default()
        };
        let qemu = Line {
            peers: [("QEMU microvm".into(), microvm.before.median())].into(),
            ..alone(
                "guest: entry until its clock runs, and console",
                &self.before,
                "QEMU's has all before its kernel's clock in it: start, firmware, loading, unpacking",
            )
        };
        vec![
            alone("bh, dom0, hv-core: until hv-vcpu runs", &self.runner, ""),
            alone("hv-vcpu: VM, rings", &self.vm, ""),
            alone("hv-vcpu: kernel and RAM disk unpacked and placed", &self.load, ""),
            qemu,
            Line::beside(
                "- guest: kernel until its first process",
                "s",
                &self.kernel,
                ("QEMU microvm", &microvm.kernel),
                Goal::None,
            ),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
hv-vcpu 2026-11-21T11:59:59.500000Z  INFO the guest starts domid=1 vcpus=1 memory_mib=256 vm_ms=5 load_ms=10
hv-vcpu 2026-11-22T00:00:01.250000Z  INFO the guest starts domid=2 vcpus=1 memory_mib=256 vm_ms=40 load_ms=1500
hv-vcpu 2026-11-22T00:00:09.250000Z  INFO the guest ended domid=2
";

    #[test]
    fn phases_add_up_over_midnight() {
        let runner = Runner::from_log(LOG).unwrap();
        assert_eq!(runner, Runner { starts: 1.25, vm: 0.04, load: 1.5 });
        let (mut ours, mut qemu) = (Timeline::default(), Timeline::default());
        // Asked for at 23:59:59: 2.25 s later the guest starts.
        ours.push(6.0, 3.0, Some((DAY - 1.0, runner)));
        qemu.push(5.0, 3.5, None);
        let lines = ours.lines(&qemu);
        let sum: f64 = lines.iter().filter_map(|l| l.ours).sum();
        assert!((sum - 6.0).abs() < 1e-6, "{sum}");
        assert!((lines[0].ours.unwrap() - 0.71).abs() < 1e-6);
        assert_eq!(lines[3].peers["QEMU microvm"], 1.5);
        assert_eq!(Runner::from_log("nothing"), None);
    }
}
