//! `event_channel.h`: the operations of `__HYPERVISOR_event_channel_op`.

consts! { "event_channel.h";
    u32 {
        EVTCHNOP_BIND_INTERDOMAIN(EVTCHNOP_bind_interdomain) = 0;
        EVTCHNOP_BIND_VIRQ(EVTCHNOP_bind_virq) = 1;
        EVTCHNOP_BIND_PIRQ(EVTCHNOP_bind_pirq) = 2;
        EVTCHNOP_CLOSE(EVTCHNOP_close) = 3;
        EVTCHNOP_SEND(EVTCHNOP_send) = 4;
        EVTCHNOP_STATUS(EVTCHNOP_status) = 5;
        EVTCHNOP_ALLOC_UNBOUND(EVTCHNOP_alloc_unbound) = 6;
        EVTCHNOP_BIND_IPI(EVTCHNOP_bind_ipi) = 7;
        EVTCHNOP_BIND_VCPU(EVTCHNOP_bind_vcpu) = 8;
        EVTCHNOP_UNMASK(EVTCHNOP_unmask) = 9;
        EVTCHNOP_RESET(EVTCHNOP_reset) = 10;
        /// FIFO ABI; refusing it (`ENOSYS`) makes a guest use the 2-level ABI.
        EVTCHNOP_INIT_CONTROL(EVTCHNOP_init_control) = 11;
        EVTCHNOP_EXPAND_ARRAY(EVTCHNOP_expand_array) = 12;
        EVTCHNOP_SET_PRIORITY(EVTCHNOP_set_priority) = 13;
        EVTCHNSTAT_CLOSED(EVTCHNSTAT_closed) = 0;
        /// Waits for the remote domain to bind.
        EVTCHNSTAT_UNBOUND(EVTCHNSTAT_unbound) = 1;
        EVTCHNSTAT_INTERDOMAIN(EVTCHNSTAT_interdomain) = 2;
        EVTCHNSTAT_PIRQ(EVTCHNSTAT_pirq) = 3;
        EVTCHNSTAT_VIRQ(EVTCHNSTAT_virq) = 4;
        EVTCHNSTAT_IPI(EVTCHNSTAT_ipi) = 5;
        /// `EvtchnBindPirq::flags`: the line may be shared.
        BIND_PIRQ_WILL_SHARE(BIND_PIRQ__WILL_SHARE) = 1;
    }
}

abi! { "event_channel.h";
    /// Makes a port of `dom` that `remote_dom` may bind.
    pub struct EvtchnAllocUnbound("struct evtchn_alloc_unbound") [8] {
        dom: u16 = 0,
        remote_dom: u16 = 2,
        /// Out.
        port: u32 = 4,
    }
    /// Binds a new local port to an unbound remote one.
    pub struct EvtchnBindInterdomain("struct evtchn_bind_interdomain") [12] {
        remote_dom: u16 = 0,
        _pad: u16 = 2,
        remote_port: u32 = 4,
        /// Out.
        local_port: u32 = 8,
    }
    /// Binds a VIRQ to a new port. A global VIRQ is bound to vCPU 0.
    pub struct EvtchnBindVirq("struct evtchn_bind_virq") [12] {
        virq: u32 = 0,
        vcpu: u32 = 4,
        /// Out.
        port: u32 = 8,
    }
    /// Binds a physical interrupt to a new port.
    pub struct EvtchnBindPirq("struct evtchn_bind_pirq") [12] {
        pirq: u32 = 0,
        flags: u32 = 4,
        /// Out.
        port: u32 = 8,
    }
    /// Makes a port for events between the domain's own vCPUs.
    pub struct EvtchnBindIpi("struct evtchn_bind_ipi") [8] {
        vcpu: u32 = 0,
        /// Out.
        port: u32 = 4,
    }
    /// Closes a port.
    pub struct EvtchnClose("struct evtchn_close") [4] {
        port: u32 = 0,
    }
    /// Notifies the other end of a port.
    pub struct EvtchnSend("struct evtchn_send") [4] {
        port: u32 = 0,
    }
    /// Asks for a port's state.
    pub struct EvtchnStatus("struct evtchn_status") [24] {
        dom: u16 = 0,
        _pad: u16 = 2,
        port: u32 = 4,
        /// Out: `EVTCHNSTAT_*`.
        status: u32 = 8,
        /// Out: the vCPU that gets the upcalls.
        vcpu: u32 = 12,
        /// Out: the remote domid (unbound, interdomain), the pirq or the virq.
        dom_or_irq("u.virq"): u32 = 16,
        /// Out: the remote port (interdomain).
        remote_port("u.interdomain.port"): u32 = 20,
    }
    /// Chooses the vCPU that gets a port's upcalls.
    pub struct EvtchnBindVcpu("struct evtchn_bind_vcpu") [8] {
        port: u32 = 0,
        vcpu: u32 = 4,
    }
    /// Unmasks a port, with the upcall if it is pending.
    pub struct EvtchnUnmask("struct evtchn_unmask") [4] {
        port: u32 = 0,
    }
    /// Closes all ports of a domain.
    pub struct EvtchnReset("struct evtchn_reset") [2] {
        dom: u16 = 0,
    }
    /// FIFO ABI: sets a vCPU's control block.
    pub struct EvtchnInitControl("struct evtchn_init_control") [24] {
        control_gfn: u64 = 0,
        offset: u32 = 8,
        vcpu: u32 = 12,
        /// Out.
        link_bits: u8 = 16,
        _pad: [u8; 7] = 17,
    }
    /// FIFO ABI: adds a page to the event array.
    pub struct EvtchnExpandArray("struct evtchn_expand_array") [8] {
        array_gfn: u64 = 0,
    }
    /// FIFO ABI: sets a port's priority.
    pub struct EvtchnSetPriority("struct evtchn_set_priority") [8] {
        port: u32 = 0,
        priority: u32 = 4,
    }
}
