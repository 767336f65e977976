//! `sched.h`: the operations of `__HYPERVISOR_sched_op`.

consts! { "sched.h";
    u32 {
        SCHEDOP_YIELD(SCHEDOP_yield) = 0;
        SCHEDOP_BLOCK(SCHEDOP_block) = 1;
        SCHEDOP_SHUTDOWN(SCHEDOP_shutdown) = 2;
        SCHEDOP_POLL(SCHEDOP_poll) = 3;
        SCHEDOP_REMOTE_SHUTDOWN(SCHEDOP_remote_shutdown) = 4;
        SCHEDOP_SHUTDOWN_CODE(SCHEDOP_shutdown_code) = 5;
        SCHEDOP_WATCHDOG(SCHEDOP_watchdog) = 6;
        SCHEDOP_PIN_OVERRIDE(SCHEDOP_pin_override) = 7;
        SHUTDOWN_POWEROFF(SHUTDOWN_poweroff) = 0;
        SHUTDOWN_REBOOT(SHUTDOWN_reboot) = 1;
        SHUTDOWN_SUSPEND(SHUTDOWN_suspend) = 2;
        SHUTDOWN_CRASH(SHUTDOWN_crash) = 3;
        SHUTDOWN_WATCHDOG(SHUTDOWN_watchdog) = 4;
        SHUTDOWN_SOFT_RESET(SHUTDOWN_soft_reset) = 5;
    }
}

abi! { "sched.h";
    /// Argument of `SCHEDOP_shutdown` and `SCHEDOP_shutdown_code`.
    pub struct SchedShutdown("struct sched_shutdown") [4] {
        /// `SHUTDOWN_*`.
        reason: u32 = 0,
    }
    /// Argument of `SCHEDOP_poll`: blocks until a port is pending.
    pub struct SchedPoll("struct sched_poll") [24] {
        /// Guest pointer to 32-bit ports.
        ports: u64 = 0,
        nr_ports: u32 = 8,
        _pad: u32 = 12,
        /// System time in nanoseconds; 0 for none.
        timeout: u64 = 16,
    }
    /// Argument of `SCHEDOP_remote_shutdown`.
    pub struct SchedRemoteShutdown("struct sched_remote_shutdown") [8] {
        domain_id: u16 = 0,
        _pad: u16 = 2,
        /// `SHUTDOWN_*`.
        reason: u32 = 4,
    }
    /// Argument of `SCHEDOP_watchdog`.
    pub struct SchedWatchdog("struct sched_watchdog") [8] {
        /// 0 makes a new one, which the call returns.
        id: u32 = 0,
        /// In seconds; 0 ends it.
        timeout: u32 = 4,
    }
}
