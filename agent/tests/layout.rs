//! The resolver of kernel field offsets, against the BTF of real kernels and against corrupt BTF.
//!
//! `golden/` has an excerpt of each kernel's BTF with the fields that are read; `offsets.txt` has their offsets.
//! `cargo xtask golden-btf` writes both, with a separate BTF reader.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::{collections::BTreeMap, fs, path::PathBuf};

use tailback::kernel::{
    btf::{Btf, BtfError},
    layout::{Feature, Resolved, resolve, resolve_without},
};
use tailback_ebpf::{ABSENT, Layout};

/// Features that each kernel lacks.
const MISSING: &[(&str, &[Feature])] = &[
    ("5.10", &[Feature::Mptcp, Feature::DropCounters]),
    ("6.1", &[Feature::DropCounters]),
    ("6.12", &[Feature::DropCounters]),
    ("6.18", &[]),
    ("7.2", &[]),
];

/// Fields that hold the size of a struct; they belong to no feature.
const SIZES: &[&str] = &["upid_size", "pipe_buffer_size", "regs_size"];

fn golden() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// The offsets of `offsets.txt`, by kernel and field.
fn table() -> BTreeMap<String, BTreeMap<String, u32>> {
    let text = fs::read_to_string(golden().join("offsets.txt")).unwrap();
    let mut lines = text.lines().filter(|line| !line.starts_with('#'));
    let kernels: Vec<&str> = lines.next().unwrap().split_whitespace().skip(2).collect();
    let mut table = BTreeMap::new();
    for line in lines {
        let mut words = line.split_whitespace();
        let field = words.next().unwrap();
        let offsets: Vec<&str> = words.skip(1).collect();
        assert_eq!(offsets.len(), kernels.len(), "{line}");
        for (kernel, offset) in kernels.iter().zip(offsets) {
            let offset = match offset {
                "-" => ABSENT,
                "?" => panic!("{field} has no offset for {kernel} yet: run cargo xtask golden-btf"),
                known => known.parse().unwrap(),
            };
            let column: &mut BTreeMap<String, u32> = table.entry((*kernel).to_owned()).or_default();
            column.insert(field.to_owned(), offset);
        }
    }
    table
}

/// Each kernel's version and BTF excerpt.
fn kernels() -> Vec<(String, Vec<u8>)> {
    let read = |version: String| {
        let file = golden().join(format!("{version}.btf"));
        let bytes = fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        (version, bytes)
    };
    table().into_keys().map(read).collect()
}

fn kernel(version: &str) -> Vec<u8> {
    let (_, bytes) = kernels()
        .into_iter()
        .find(|(known, _)| known == version)
        .unwrap();
    bytes
}

fn by_name(layout: &Layout) -> BTreeMap<String, u32> {
    let offsets: &[u32] = bytemuck::cast_slice(bytemuck::bytes_of(layout));
    let fields = Layout::FIELDS.iter().map(|field| (*field).to_owned());
    fields.zip(offsets.iter().copied()).collect()
}

fn resolved(bytes: &[u8]) -> Resolved {
    resolve(&Btf::parse(bytes).unwrap())
}

/// Deterministic pseudo-random numbers (xorshift64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// Parses and resolves the bytes as far as they go.
fn parse_and_resolve(bytes: &[u8]) {
    if let Ok(btf) = Btf::parse(bytes) {
        let found = resolve(&btf);
        for missing in &found.missing {
            assert!(!missing.to_string().is_empty());
        }
    }
}

#[test]
fn every_field_has_the_expected_offset_on_every_kernel() {
    let table = table();
    for (version, bytes) in kernels() {
        assert_eq!(
            by_name(&resolved(&bytes).layout),
            table[&version],
            "{version}"
        );
    }
}

#[test]
fn stall_times_are_behind_a_pointer_on_newer_kernels() {
    for (version, bytes) in kernels() {
        let is_pointer = resolved(&bytes).controllers.psi_is_pointer == 1;
        assert_eq!(is_pointer, version != "5.10", "{version}");
    }
}

#[test]
fn the_table_lists_every_field() {
    for (version, column) in table() {
        let mut fields: Vec<&str> = Layout::FIELDS.to_vec();
        fields.sort_unstable();
        let known: Vec<&str> = column.keys().map(String::as_str).collect();
        assert_eq!(known, fields, "{version}");
    }
}

#[test]
fn each_kernel_lacks_exactly_the_expected_features() {
    let versions: Vec<String> = kernels().into_iter().map(|(version, _)| version).collect();
    let known: Vec<&str> = MISSING.iter().map(|(version, _)| *version).collect();
    assert_eq!(versions, known);
    for (version, features) in MISSING {
        let found = resolved(&kernel(version));
        let lost: Vec<Feature> = Feature::ALL
            .iter()
            .copied()
            .filter(|feature| !found.has(*feature))
            .collect();
        assert_eq!(lost, *features, "{version}: {:?}", found.missing);
    }
}

/// The feature that `whole` has and `without` lacks; never more than one.
fn lost(whole: &Resolved, without: &Resolved) -> Option<Feature> {
    let mut lost = Feature::ALL
        .iter()
        .copied()
        .filter(|feature| whole.has(*feature) && !without.has(*feature));
    let first = lost.next();
    assert_eq!(lost.next(), None);
    first
}

#[test]
fn a_missing_field_disables_its_feature_and_no_other() {
    for (version, bytes) in kernels() {
        let btf = Btf::parse(&bytes).unwrap();
        let whole = resolve(&btf);
        let all = by_name(&whole.layout);
        for field in Layout::FIELDS.iter().filter(|field| !SIZES.contains(field)) {
            let without = resolve_without(&btf, &[field]);
            let Some(lost) = lost(&whole, &without) else {
                assert_eq!(all[*field], ABSENT, "{version} without {field}");
                continue;
            };
            for feature in Feature::ALL.iter().copied() {
                assert_eq!(
                    without.has(feature),
                    whole.has(feature) && feature != lost,
                    "{version} without {field}"
                );
            }
            // Each other field is unchanged, or absent along with its feature.
            for (other, offset) in by_name(&without.layout) {
                if offset != all[&other] {
                    assert_eq!(offset, ABSENT, "{version} without {field}: {other}");
                    let with_it = self::lost(&whole, &resolve_without(&btf, &[&other]));
                    assert_eq!(with_it, Some(lost), "{version} without {field}: {other}");
                }
            }
            assert_eq!(by_name(&without.layout)[*field], ABSENT);
        }
    }
}

/// The bytes with one name replaced by another of the same length.
fn renamed(mut bytes: Vec<u8>, from: &str, to: &str) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let wanted = [b"\0", from.as_bytes(), b"\0"].concat();
    let at = bytes
        .windows(wanted.len())
        .position(|window| window == wanted);
    let at = at.unwrap_or_else(|| panic!("there is no {from}")) + 1;
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    bytes
}

#[test]
fn a_renamed_field_is_found_under_either_name() {
    let holds = |bytes: &[u8], name: &[u8]| bytes.windows(name.len()).any(|part| part == name);
    assert!(!holds(&kernel("5.10"), b"\0__state\0"));
    assert!(holds(&kernel("6.1"), b"\0__state\0"));
    assert_eq!(resolved(&kernel("5.10")).layout.task_state, 16);
    assert_eq!(resolved(&kernel("6.1")).layout.task_state, 24);

    let real = renamed(kernel("6.1"), "start_boottime", "start_bootTIME");
    assert!(!resolved(&real).has(Feature::Base));
    let old = renamed(kernel("5.10"), "state", "STATE");
    let missing = resolved(&old).missing;
    let base = missing
        .iter()
        .find(|missing| missing.feature == Feature::Base);
    assert_eq!(
        base.unwrap().to_string(),
        "struct task_struct has no field `__state` or `state`"
    );
}

#[test]
fn a_missing_struct_is_reported_with_each_of_its_fields() {
    let found = resolved(&renamed(
        kernel("6.12"),
        "pipe_inode_info",
        "pipe_inode_INFO",
    ));
    assert!(!found.has(Feature::Pipes) && found.has(Feature::Base));
    let fields: Vec<String> = found.missing.iter().map(ToString::to_string).collect();
    assert!(
        fields.contains(&"struct pipe_inode_info has no field `ring_size`".to_owned()),
        "{fields:?}"
    );
}

#[test]
fn truncated_btf_is_an_error_at_every_length() {
    for (version, bytes) in kernels() {
        for len in 0..bytes.len() {
            match Btf::parse(&bytes[..len]) {
                Err(BtfError::Truncated(_)) => {}
                Err(other) => panic!("{version} cut after {len} bytes: {other}"),
                Ok(_) => panic!("{version} cut after {len} bytes is accepted"),
            }
        }
    }
}

#[test]
fn bytes_that_are_not_btf_are_an_error_with_the_reason() {
    let error = |bytes: &[u8]| Btf::parse(bytes).map(|_| ()).unwrap_err().to_string();
    assert_eq!(error(b""), "BTF is cut short inside its header");
    assert_eq!(
        error(b"\x7fELF\x02\x01\x01"),
        "not BTF: it begins with 0x457f, not 0xeb9f"
    );
    // Big-endian BTF.
    assert_eq!(
        error(b"\xeb\x9f\x01\x00"),
        "not BTF: it begins with 0x9feb, not 0xeb9f"
    );
    let mut newer = kernel("6.1");
    // The kind of the first type.
    newer[24 + 7] = 31;
    assert_eq!(
        error(&newer),
        "BTF type 1 is of kind 31, which this version does not know"
    );
}

#[test]
fn a_flipped_byte_never_makes_the_resolver_panic() {
    for (_, mut bytes) in kernels() {
        for at in 0..bytes.len() {
            let mask = [0x01, 0x80, 0xff][at % 3];
            bytes[at] ^= mask;
            parse_and_resolve(&bytes);
            bytes[at] ^= mask;
        }
    }
}

#[test]
fn many_corrupt_bytes_never_make_the_resolver_panic() {
    let mut numbers = Numbers(0x7a11_bac4);
    for (_, bytes) in kernels() {
        for _ in 0..500 {
            let mut corrupt = bytes.clone();
            for _ in 0..=numbers.below(32) {
                let at = numbers.below(corrupt.len());
                corrupt[at] = match numbers.below(3) {
                    0 => 0,
                    1 => 0xff,
                    _ => numbers.next() as u8,
                };
            }
            parse_and_resolve(&corrupt);
        }
    }
}

#[test]
fn random_bytes_never_make_the_resolver_panic() {
    let mut numbers = Numbers(0xf111);
    for _ in 0..2_000 {
        let len = numbers.below(2_000) / 4 * 4;
        let mut noise: Vec<u8> = (0..len).map(|_| numbers.next() as u8).collect();
        parse_and_resolve(&noise);
        // The same bytes behind a valid BTF header.
        let types = numbers.below(len + 1) as u32;
        let header = [0x0001_eb9f, 24, 0, types, types, len as u32 - types];
        noise.splice(0..0, header.into_iter().flat_map(u32::to_le_bytes));
        parse_and_resolve(&noise);
    }
}

/// BTF of these types and one string: `task_struct`, at offset 1.
fn handmade(types: &[u32]) -> Vec<u8> {
    let strings = b"\0task_struct\0";
    let len = types.len() as u32 * 4;
    let header = [0x0001_eb9f, 24, 0, len, len, strings.len() as u32];
    let words = header.iter().chain(types).copied();
    let mut bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
    bytes.extend(strings);
    bytes
}

#[test]
fn a_struct_that_contains_itself_does_not_hang_the_resolver() {
    const STRUCT: u32 = 4 << 24;
    // Two thousand anonymous members, each of the type of the struct itself.
    let mut types = vec![1, STRUCT | 2_000, 8];
    types.extend([0, 1, 0].repeat(2_000));
    let found = resolved(&handmade(&types));
    assert!(!found.has(Feature::Base));
}

#[test]
fn a_cycle_of_typedefs_does_not_hang_the_resolver() {
    const STRUCT: u32 = 4 << 24;
    const TYPEDEF: u32 = 8 << 24;
    let types = [1, STRUCT | 1, 8, 0, 2, 0, 0, TYPEDEF, 3, 0, TYPEDEF, 2];
    assert!(!resolved(&handmade(&types)).has(Feature::Base));
}

#[test]
fn the_running_kernel_has_every_base_field() {
    let Ok(bytes) = fs::read(tailback::kernel::scanner::BTF_PATH) else {
        tailback_tests::skip::skip(
            "the_running_kernel_has_every_base_field",
            "this kernel has no BTF",
        );
        return;
    };
    let found = resolved(&bytes);
    assert!(found.has(Feature::Base), "{:?}", found.missing);
}
