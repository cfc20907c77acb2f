//! Writes performance data as HotSpot lays it out (OpenJDK: perfMemory.hpp, perfData.hpp).

/// The counters that the agent reads of a JVM with one collector, in the order of `values` in [`jvm`].
pub const NAMES: [&str; 7] = [
    "sun.os.hrt.frequency",
    "sun.rt.safepoints",
    "sun.rt.safepointTime",
    "sun.gc.collector.0.invocations",
    "sun.gc.collector.0.time",
    "sun.gc.collector.0.lastEntryTime",
    "sun.gc.collector.0.lastExitTime",
];

/// Counters by name and value, in either byte order.
pub fn file(counters: &[(&str, i64)], is_little_endian: bool) -> Vec<u8> {
    const HEADER_LEN: usize = 32;
    const ENTRY_LEN: usize = 20;
    let int = |value: usize| {
        let value = value as u32;
        if is_little_endian {
            value.to_le_bytes()
        } else {
            value.to_be_bytes()
        }
    };
    let mut content = Vec::new();
    for (name, value) in counters {
        let value_at = (ENTRY_LEN + name.len() + 1).next_multiple_of(8);
        let mut entry = [value_at + 8, ENTRY_LEN, 0].map(int).concat();
        entry.extend([b'J', 0, 3, 2]);
        entry.extend(int(value_at));
        entry.extend(name.bytes());
        entry.resize(value_at, 0);
        entry.extend(if is_little_endian {
            value.to_le_bytes()
        } else {
            value.to_be_bytes()
        });
        content.extend(entry);
    }
    let mut bytes = vec![0xca, 0xfe, 0xc0, 0xc0, u8::from(is_little_endian), 2, 0, 1];
    bytes.extend(int(HEADER_LEN + content.len()));
    bytes.extend([0; 12]);
    bytes.extend(int(HEADER_LEN));
    bytes.extend(int(counters.len()));
    bytes.extend(content);
    bytes
}

/// The counters of a JVM with these values.
pub fn jvm(values: [i64; 7], is_little_endian: bool) -> Vec<u8> {
    let counters: Vec<(&str, i64)> = NAMES.into_iter().zip(values).collect();
    file(&counters, is_little_endian)
}
