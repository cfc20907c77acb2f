use std::collections::BTreeMap;

use tailback::kernel::{
    LoadError,
    btf::Btf,
    layout::{Feature, Resolved, resolve, resolve_without},
    scanner::Scanner,
};
use tailback_ebpf::Layout;

use crate::own_process::{kernel_btf, watch_own_process};

fn by_name(layout: &Layout) -> BTreeMap<&'static str, u32> {
    let offsets: &[u32] = bytemuck::cast_slice(bytemuck::bytes_of(layout));
    Layout::FIELDS
        .iter()
        .copied()
        .zip(offsets.iter().copied())
        .collect()
}

/// The layout with one field at another offset.
fn moved(found: &Resolved, field: &str, offset: u32) -> Resolved {
    let at = Layout::FIELDS.iter().position(|known| *known == field);
    let at = at.unwrap_or_else(|| panic!("there is no field {field}"));
    let mut moved = found.clone();
    let offsets: &mut [u32] = bytemuck::cast_slice_mut(bytemuck::bytes_of_mut(&mut moved.layout));
    offsets[at] = offset;
    moved
}

/// The verifier's reason for rejecting the programs that read `field`, if its offset is `offset`.
fn rejection(found: &Resolved, field: &str, offset: u32) -> String {
    let reason = match Scanner::load_with(&moved(found, field, offset), false) {
        Err(error @ LoadError::Rejected { .. }) => error.to_string(),
        Err(error) => panic!("{field} at {offset}: {error}"),
        Ok(scanner) => {
            let failed = scanner.capabilities().failed_scans();
            let Some((_, reason)) = failed.first() else {
                panic!("the kernel accepts {field} at {offset}");
            };
            (*reason).to_owned()
        }
    };
    assert!(
        reason.contains("the verifier rejected"),
        "{field} at {offset}: {reason}"
    );
    reason
}

#[test]
fn the_verifier_accepts_the_layout_of_its_own_kernel() {
    let Some(bytes) = kernel_btf("the_verifier_accepts_the_layout_of_its_own_kernel") else {
        return;
    };
    let found = resolve(&Btf::parse(&bytes).unwrap());
    let scanner = Scanner::load_with(&found, false).unwrap_or_else(|error| panic!("{error:#}"));
    assert_eq!(scanner.capabilities().fields, found);
    assert_eq!(scanner.capabilities().failed_scans(), []);
}

#[test]
fn the_verifier_rejects_an_offset_outside_of_the_struct() {
    let Some(bytes) = kernel_btf("the_verifier_rejects_an_offset_outside_of_the_struct") else {
        return;
    };
    // One field of each struct except `pid`, which ends in an array without a length and so has no outside
    // (btf_struct_walk, kernel/bpf/btf.c).
    let fields = [
        "task_comm",
        "file_mode",
        "inode_pipe",
        "pipe_head",
        "socket_sk",
        "sk_rcvbuf",
        "net_inum",
        "tcp_snd_nxt",
        "req_dl_next",
        "req_snt_synack",
    ];
    let found = resolve(&Btf::parse(&bytes).unwrap());
    for field in fields {
        rejection(&found, field, 1 << 20);
    }
}

#[test]
fn the_verifier_rejects_an_access_that_does_not_fit_the_type() {
    let Some(bytes) = kernel_btf("the_verifier_rejects_an_access_that_does_not_fit_the_type")
    else {
        return;
    };
    let found = resolve(&Btf::parse(&bytes).unwrap());
    let at = by_name(&found.layout);

    let across = rejection(&found, "tcp_snd_wnd", at["tcp_snd_wnd"] + 2);
    assert!(across.contains("beyond the end of member"), "{across}");
    let half_a_pointer = rejection(&found, "task_flags", at["task_group_leader"]);
    assert!(
        half_a_pointer.contains("cannot access ptr member group_leader"),
        "{half_a_pointer}"
    );
    let no_pointer = rejection(&found, "task_group_leader", at["task_start_boottime"]);
    assert!(
        no_pointer.contains("invalid mem access 'scalar'"),
        "{no_pointer}"
    );
    let btf = Btf::parse(&bytes).unwrap();
    let socket = btf.structs(&["socket"])[0].unwrap();
    let ops = btf.field(socket, "ops").unwrap();
    let another_struct = rejection(&found, "socket_sk", ops.offset);
    assert!(
        another_struct.contains("struct proto_ops"),
        "{another_struct}"
    );
}

#[test]
fn a_rejected_program_is_switched_off_and_the_others_keep_working() {
    let test = "a_rejected_program_is_switched_off_and_the_others_keep_working";
    let Some(bytes) = kernel_btf(test) else {
        return;
    };
    let found = resolve(&Btf::parse(&bytes).unwrap());
    let mut scanner = watch_own_process(&moved(&found, "tcp_snd_nxt", 1 << 20));
    let capabilities = scanner.capabilities();
    assert!(capabilities.files.is_err());
    assert_eq!(
        (&capabilities.threads, &capabilities.waits),
        (&Ok(()), &Ok(()))
    );
    let mut threads = 0;
    scanner.scan_threads(&mut |_| threads += 1).unwrap();
    assert!(threads > 0);
    scanner
        .scan_files(&mut |record| panic!("{record:?}"))
        .unwrap();
}

#[test]
fn without_a_base_field_the_error_names_it() {
    let Some(bytes) = kernel_btf("without_a_base_field_the_error_names_it") else {
        return;
    };
    let btf = Btf::parse(&bytes).unwrap();
    for field in Layout::FIELDS {
        let without = resolve_without(&btf, &[field]);
        let Some(missing) = without.missing.first() else {
            continue;
        };
        if missing.feature != Feature::Base {
            continue;
        }
        let expected = format!(
            "this kernel cannot be watched: struct {} has no field `{}`",
            missing.container,
            missing.paths.join("` or `")
        );
        let error = Scanner::load_with(&without, false)
            .err()
            .map(|error| error.to_string());
        assert_eq!(error, Some(expected), "without {field}");
    }
}
