//! Property tests: what is encoded decodes to the same, and no bytes from a peer make a decoder fail.

use proptest::prelude::*;
use xen_abi::hvm::CallbackVia;
use xen_abi::io::blkif::x86_32::*;
use xen_abi::io::blkif::*;
use xen_abi::io::netif::{Extra, NetifExtraInfo, NetifTxRequest, RxSlot, TxSlot};
use xen_abi::{errno, xenbus::XenbusState, xs_wire};

fn segment() -> impl Strategy<Value = BlkifRequestSegment> {
    any::<(u32, u8, u8)>().prop_map(|(gref, first, last)| BlkifRequestSegment::new(gref, first, last))
}

fn direct() -> impl Strategy<Value = BlkifRequest> {
    let head = (0..=3u8, any::<u8>(), any::<u16>(), any::<u64>(), any::<u64>());
    (head, proptest::array::uniform11(segment())).prop_map(|(head, seg)| {
        let (operation, nr_segments, handle, id, sector_number) = head;
        BlkifRequest { operation, nr_segments, handle, id, sector_number, seg, ..Default::default() }
    })
}

fn discard() -> impl Strategy<Value = BlkifRequestDiscard> {
    any::<(u8, u16, u64, u64, u64)>().prop_map(|(flag, handle, id, sector_number, nr_sectors)| {
        let operation = BLKIF_OP_DISCARD;
        BlkifRequestDiscard { operation, flag, handle, id, sector_number, nr_sectors, ..Default::default() }
    })
}

fn indirect() -> impl Strategy<Value = BlkifRequestIndirect> {
    any::<(u8, u16, u64, u64, u16, [u32; 8])>().prop_map(
        |(indirect_op, nr_segments, id, sector_number, handle, indirect_grefs)| BlkifRequestIndirect {
            operation: BLKIF_OP_INDIRECT,
            indirect_op,
            nr_segments,
            id,
            sector_number,
            handle,
            indirect_grefs,
            ..Default::default()
        },
    )
}

fn request() -> impl Strategy<Value = Request> {
    let unknown = (prop_oneof![Just(4u8), 7..=255u8], any::<u64>());
    prop_oneof![
        direct().prop_map(Request::Direct),
        discard().prop_map(Request::Discard),
        indirect().prop_map(Request::Indirect),
        unknown.prop_map(|(operation, id)| Request::Unknown { operation, id }),
    ]
}

fn bytes<const N: usize>() -> impl Strategy<Value = [u8; N]> {
    proptest::collection::vec(any::<u8>(), N).prop_map(|bytes| bytes.try_into().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn blkif_32_and_64_bit_layouts_convert(d in direct(), c in discard(), i in indirect()) {
        prop_assert_eq!(BlkifRequest::from(BlkifRequest32::from(d)), d);
        prop_assert_eq!(BlkifRequestDiscard::from(BlkifRequestDiscard32::from(c)), c);
        prop_assert_eq!(BlkifRequestIndirect::from(BlkifRequestIndirect32::from(i)), i);
    }

    #[test]
    fn blkif_requests_round_trip(request in request()) {
        for abi in [Abi::X86_64, Abi::X86_32] {
            let mut slot = abi.encode(&request);
            // The bytes behind a 32-bit slot belong to the next one.
            slot[abi.entry_size()..].fill(0xee);
            prop_assert_eq!(abi.decode(&slot), request);
        }
    }

    #[test]
    fn any_blkif_slot_decodes(slot in bytes::<MAX_ENTRY_SIZE>()) {
        for abi in [Abi::X86_64, Abi::X86_32] {
            let request = abi.decode(&slot);
            let at = if abi == Abi::X86_64 { 8 } else { 4 };
            let echoed = if let Request::Indirect(request) = request { request.indirect_op } else { slot[0] };
            prop_assert_eq!(request.operation(), echoed);
            let id = request.id().to_le_bytes();
            prop_assert_eq!(&id[..], &slot[at..at + 8]);
            if let Request::Direct(direct) = request {
                prop_assert_eq!(direct.segments().is_some(), direct.nr_segments <= 11);
                for segment in direct.seg {
                    prop_assert!(segment.sectors().is_none_or(|sectors| (1..=8).contains(&sectors)));
                }
            }
        }
    }

    #[test]
    fn blkif_responses_round_trip(id: u64, operation: u8, status: i16) {
        for abi in [Abi::X86_64, Abi::X86_32] {
            let bytes = abi.encode_response(id, operation, status);
            let response = abi.decode_response(&bytes);
            prop_assert_eq!((response.id, response.operation, response.status), (id, operation, status));
        }
    }

    #[test]
    fn netif_slots_round_trip(request: [u16; 4], gref: u32, slot in bytes::<12>(), more: bool) {
        let [offset, flags, id, size] = request;
        let request = NetifTxRequest { gref, offset, flags, id, size };
        prop_assert_eq!(TxSlot::from(request).request(), request);
        let info = TxSlot(slot).extra_info();
        prop_assert_eq!(RxSlot(slot[..8].try_into().unwrap()).extra_info(), info);
        if let Some(extra) = info.extra() {
            let again = NetifExtraInfo::new(extra, more);
            prop_assert_eq!((again.extra(), again.more()), (Some(extra), more));
            prop_assert_eq!(TxSlot::from(again).extra_info(), again);
        }
    }

    #[test]
    fn callback_via_round_trips(value: u64) {
        if let Some(via) = CallbackVia::from_raw(value) {
            prop_assert_eq!(CallbackVia::from_raw(via.raw()), Some(via));
        }
    }
}

/// XSA-216: bytes that leave are zero where the ABI has padding.
#[test]
fn xsa_216_response_padding_is_zero() {
    let bytes = Abi::X86_64.encode_response(u64::MAX, 0xff, -1);
    assert_eq!((bytes[9], &bytes[12..]), (0, &[0u8; 4][..]));
    let bytes = Abi::X86_32.encode_response(u64::MAX, 0xff, -1);
    assert_eq!(bytes[9], 0);
}

#[test]
fn names_and_numbers() {
    assert_eq!(errno::name(-errno::EINVAL), Some("EINVAL"));
    assert_eq!(errno::name(i32::MIN), None);
    for (number, name) in xs_wire::XSD_ERRORS {
        assert_eq!((xs_wire::error_name(number), xs_wire::error_number(name)), (name, Some(number)));
        assert_eq!(errno::name(number), Some(name));
    }
    assert_eq!((xs_wire::error_name(errno::ETIME), xs_wire::error_number("ETIME")), ("EINVAL", None));
    for state in XenbusState::ALL {
        assert_eq!(
            (XenbusState::parse(state.as_str()), XenbusState::from_raw(state.raw())),
            (*state, Some(*state))
        );
    }
    assert_eq!(XenbusState::parse("9"), XenbusState::Unknown);
    assert_eq!(CallbackVia::from_raw(0x0200_0000_0000_00f3), Some(CallbackVia::Vector(0xf3)));
    assert_eq!(CallbackVia::from_raw(0xff00_0000_0000_0000), None);
    let extra = Extra::Gso { size: 1448, gso_type: 1, features: 0 };
    assert_eq!(NetifExtraInfo::new(extra, true).u, [0xa8, 0x05, 1, 0, 0, 0]);
}
