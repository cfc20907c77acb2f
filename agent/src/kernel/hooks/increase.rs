//! What a histogram of waits has gained between two reads.

use tailback_ebpf::{WAIT_BUCKETS, WaitKey, Waits, WorstWait};

/// The waits of one key since the last reading, on all CPUs.
#[derive(Clone, Debug)]
pub struct NewWaits {
    pub key: WaitKey,
    pub count: u64,
    pub total_ns: u64,
    /// Index and number of the buckets that are not empty.
    pub buckets: Vec<(u32, u32)>,
    /// The longest of them.
    pub worst: Option<WorstWait>,
}

/// What a histogram held when it was last read.
pub(super) struct Known {
    count: u64,
    total_ns: u64,
    buckets: [u32; WAIT_BUCKETS],
    /// When the longest wait ended that was last read, per CPU; CLOCK_MONOTONIC, ns.
    worst_at_ns: Vec<u64>,
}

impl Known {
    pub(super) fn empty() -> Self {
        Self {
            count: 0,
            total_ns: 0,
            buckets: [0; WAIT_BUCKETS],
            worst_at_ns: Vec::new(),
        }
    }

    /// Takes the present values of a histogram. Returns the increase since the last read, if there is any.
    pub(super) fn update<'a>(
        &mut self,
        key: WaitKey,
        of_cpus: impl Iterator<Item = &'a Waits>,
    ) -> Option<NewWaits> {
        let mut now = Self::empty();
        let mut worst: Option<WorstWait> = None;
        for (cpu, of_cpu) in of_cpus.enumerate() {
            now.count = now.count.wrapping_add(of_cpu.count);
            now.total_ns = now.total_ns.wrapping_add(of_cpu.total_ns);
            for (sum, count) in now.buckets.iter_mut().zip(of_cpu.buckets) {
                *sum = sum.wrapping_add(count);
            }
            // Not by its interval: the last wait may have ended after its histogram was read, and before the next interval
            // began.
            let read_at_ns = self.worst_at_ns.get(cpu).copied().unwrap_or(0);
            let is_new = of_cpu.worst.at_ns != read_at_ns;
            let is_worse = worst.is_none_or(|worst| worst.wait_ns < of_cpu.worst.wait_ns);
            if is_new && is_worse {
                worst = Some(of_cpu.worst);
            }
            now.worst_at_ns.push(of_cpu.worst.at_ns);
        }
        let counts = now.buckets.iter().zip(&self.buckets).zip(0..);
        let counts = counts.map(|((now, before), index)| (index, now.wrapping_sub(*before)));
        let new = NewWaits {
            key,
            count: now.count.saturating_sub(self.count),
            total_ns: now.total_ns.wrapping_sub(self.total_ns),
            buckets: counts.filter(|(_, count)| *count > 0).collect(),
            worst,
        };
        *self = now;
        (new.count > 0).then_some(new)
    }
}

#[cfg(test)]
mod tests {
    use bytemuck::Zeroable as _;
    use tailback_ebpf::bucket_of;

    use super::*;

    #[test]
    fn a_longest_wait_is_reported_in_one_interval_only() {
        let of_cpu = |count, wait_ns, at_ns| {
            let mut waits = Waits::zeroed();
            (waits.count, waits.total_ns) = (count, wait_ns);
            (waits.worst.wait_ns, waits.worst.at_ns) = (wait_ns, at_ns);
            waits.buckets[bucket_of(wait_ns) as usize] = count as u32;
            waits
        };
        let key = WaitKey::zeroed();
        let mut known = Known::empty();
        let first = [of_cpu(1, 5_000, 100), of_cpu(1, 9_000, 90)];
        let new = known.update(key, first.iter()).unwrap();
        assert_eq!((new.count, new.total_ns), (2, 14_000));
        assert_eq!(new.worst.unwrap().wait_ns, 9_000);
        assert!(known.update(key, first.iter()).is_none());
        // Another wait on the first CPU, which is not longer than the one that was reported.
        let second = [of_cpu(2, 6_000, 110), of_cpu(1, 9_000, 90)];
        let new = known.update(key, second.iter()).unwrap();
        assert_eq!((new.count, new.worst.unwrap().wait_ns), (1, 6_000));
        // And one that was not the longest of its interval.
        let third = [of_cpu(3, 6_000, 110), of_cpu(1, 9_000, 90)];
        assert!(known.update(key, third.iter()).unwrap().worst.is_none());
    }
}
