use super::*;

const SECOND: u64 = 1_000 * MS;

fn whole(cpu_ns: u64) -> SampleCost {
    with_threads(cpu_ns, 0)
}

fn with_threads(cpu_ns: u64, threads_ns: u64) -> SampleCost {
    SampleCost {
        cpu_ns,
        threads_ns,
        profile_ns: 0,
    }
}

/// A schedule without saved CPU time.
fn schedule(budget: Budget, now_ns: u64) -> Schedule {
    let mut schedule = Schedule::new(budget, now_ns);
    schedule.allocation.spend_savings();
    schedule
}

/// Ten focused seconds in which a profile costs `profile_ns`, and a scan over files `files_ns` beyond the rest.
/// Returns (profiles per second, CPU share).
fn profiles(profile_ns: u64, files_ns: u64, budget: Budget) -> (f64, f64) {
    let mut schedule = schedule(budget, SECOND);
    schedule.set_focused(true);
    let (mut profiles, mut cpu) = (0, 0);
    let mut now = SECOND;
    while now < 23 * SECOND {
        let plan = schedule.next(now);
        now = plan.due_ns;
        assert!(plan.base || !plan.threads, "{plan:?}");
        let profile = u64::from(plan.profile) * profile_ns;
        let cost = SampleCost {
            cpu_ns: 50_000 + u64::from(plan.files) * files_ns + profile,
            threads_ns: 0,
            profile_ns: profile,
        };
        schedule.account(plan, cost);
        if now >= 13 * SECOND {
            profiles += u64::from(plan.profile);
            cpu += cost.cpu_ns;
        }
    }
    (profiles as f64 / 10.0, cpu as f64 / 10.0 / SECOND as f64)
}

#[test]
fn a_cheap_profile_is_sampled_a_hundred_times_a_second() {
    let (rate, share) = profiles(10_000, 100_000, Budget::default());
    assert!(rate > 95.0, "{rate}");
    assert!(share <= 0.0105, "{share}");
}

#[test]
fn an_expensive_profile_lowers_its_own_rate() {
    let (rate, share) = profiles(200_000, 100_000, Budget::default());
    assert!((20.0..40.0).contains(&rate), "{rate}");
    assert!(share <= 0.0105, "{share}");
    let (rate, share) = profiles(10 * MS, 100_000, Budget::default());
    assert!((0.4..1.0).contains(&rate), "{rate}");
    assert!(share <= 0.0105, "{share}");
}

#[test]
fn expensive_scans_over_files_leave_room_for_the_profile() {
    let (rate, share) = profiles(50_000, 20 * MS, Budget::default());
    assert!(rate > 20.0, "{rate}");
    assert!(share <= 0.0115, "{share}");
}

#[test]
fn focus_samples_that_are_cheap_with_warm_caches_are_found_by_trial() {
    let mut schedule = schedule(Budget::default(), SECOND);
    schedule.set_focused(true);
    let (mut extra, mut last, mut now) = (0, SECOND, SECOND);
    while now < 13 * SECOND {
        let plan = schedule.next(now);
        now = plan.due_ns;
        // After a hundred milliseconds the caches are cold.
        let cold = if now - last > 50 * MS {
            400_000
        } else {
            60_000
        };
        last = now;
        schedule.account(plan, whole(cold));
        extra += u64::from(!plan.base && now >= 11 * SECOND);
    }
    assert!(extra > 100, "{extra}");
}

#[test]
fn one_expensive_focus_sample_does_not_end_them() {
    let mut schedule = schedule(Budget::default(), SECOND);
    schedule.set_focused(true);
    let (mut extra, mut now) = (0, SECOND);
    let mut was_expensive = false;
    while now < 13 * SECOND {
        let plan = schedule.next(now);
        now = plan.due_ns;
        let is_expensive = !plan.base && !was_expensive;
        was_expensive |= is_expensive;
        schedule.account(plan, whole(if is_expensive { 5 * MS } else { 100_000 }));
        extra += u64::from(!plan.base && now >= 11 * SECOND);
    }
    assert!(extra > 60, "{extra}");
}

#[test]
fn a_larger_budget_buys_more_of_an_expensive_profile() {
    let budget = Budget {
        cpu_share: 0.05,
        ..Budget::default()
    };
    let (rate, share) = profiles(400_000, 100_000, budget);
    assert!(rate > 80.0, "{rate}");
    assert!(share <= 0.0525, "{share}");
}

#[test]
fn nothing_is_profiled_unless_a_target_is_focused() {
    let mut schedule = schedule(Budget::default(), SECOND);
    let mut now = SECOND;
    for _ in 0..100 {
        let plan = schedule.next(now);
        now = plan.due_ns;
        assert!(!plan.profile);
        schedule.account(plan, whole(50_000));
    }
}

/// Runs ten seconds with the given costs. Returns (base samples, focus samples, scans over files, CPU time) per second.
fn run(light_ns: u64, heavy_ns: u64, focused: bool) -> (f64, f64, f64, f64) {
    let mut schedule = schedule(Budget::default(), SECOND);
    schedule.set_focused(focused);
    let (mut base, mut extra, mut files, mut cpu) = (0, 0, 0, 0);
    let mut now = SECOND;
    // Two seconds to learn the costs, then ten that count.
    while now < 13 * SECOND {
        let plan = schedule.next(now);
        now = plan.due_ns;
        let cost = if plan.files { heavy_ns } else { light_ns };
        schedule.account(plan, whole(cost));
        if now >= 3 * SECOND {
            base += u64::from(plan.base);
            extra += u64::from(!plan.base);
            files += u64::from(plan.files);
            cpu += cost;
        }
    }
    let per_s = |count: u64| count as f64 / 10.0;
    (
        per_s(base),
        per_s(extra),
        per_s(files),
        cpu as f64 / 10.0 / SECOND as f64,
    )
}

#[test]
fn all_scans_together_are_brought_down_to_the_budget() {
    // Each scan is at its longest interval, and there are costs that no scan accounts for.
    let mut schedule = schedule(Budget::default(), SECOND);
    schedule.set_focused(true);
    let (mut cpu, mut late_cpu, mut now) = (0, 0, SECOND);
    while now < 60 * SECOND {
        let plan = schedule.next(now);
        now = plan.due_ns;
        let cost = SampleCost {
            cpu_ns: 500_000 + u64::from(plan.files) * 3 * MS,
            threads_ns: u64::from(plan.threads) * 4 * MS,
            profile_ns: u64::from(plan.profile) * MS,
        };
        let cost = SampleCost {
            cpu_ns: cost.cpu_ns + cost.threads_ns + cost.profile_ns,
            ..cost
        };
        schedule.account(plan, cost);
        cpu += cost.cpu_ns + 300_000;
        schedule.measured(now, cpu);
        if now <= 20 * SECOND {
            late_cpu = cpu;
        }
    }
    let share = (cpu - late_cpu) as f64 / 40.0 / SECOND as f64;
    assert!((0.008..=0.0105).contains(&share), "{share}");
    // Once CPU use is low again, the whole budget is allocated, and once nothing is focused, no more than that.
    for second in 0..60 {
        schedule.measured(now + second * SECOND, cpu);
    }
    schedule.set_spending(true, now);
    assert!(schedule.cpu_share() > schedule.budget().cpu_share);
    schedule.set_spending(false, now);
    assert_eq!(schedule.cpu_share(), schedule.budget().cpu_share);
}

#[test]
fn every_sample_of_a_small_service_includes_all_scans() {
    let (base, extra, files, _) = run(100_000, 300_000, false);
    assert_eq!((base.round(), extra, files.round()), (10.0, 0.0, 10.0));
}

#[test]
fn many_sockets_stretch_only_the_scan_over_files() {
    let (base, _, files, share) = run(100_000, 15 * MS, false);
    assert_eq!(base.round(), 10.0);
    assert!(files < 1.0, "{files}");
    assert!(share <= 0.0115, "{share}");
}

#[test]
fn thousands_of_threads_stretch_the_scan_over_threads() {
    let mut schedule = schedule(Budget::default(), SECOND);
    let (mut base, mut thread_scans, mut files, mut cpu) = (0, 0, 0, 0);
    let mut now = SECOND;
    while now < 23 * SECOND {
        let plan = schedule.next(now);
        now = plan.due_ns;
        let threads = u64::from(plan.threads) * 5 * MS;
        let cost = 100_000 + threads + u64::from(plan.files) * 200_000;
        schedule.account(plan, with_threads(cost, threads));
        if now >= 3 * SECOND {
            base += 1;
            thread_scans += u64::from(plan.threads);
            files += u64::from(plan.files);
            cpu += cost;
        }
    }
    let share = cpu as f64 / 20.0 / SECOND as f64;
    assert!((199..=201).contains(&base), "{base}");
    assert!(
        (15..40).contains(&thread_scans),
        "{thread_scans} scans over threads"
    );
    assert!(files >= 100, "{files} scans over files");
    assert!(share <= 0.0115, "{share}");
    // When most of them have ended, it is soon back on every plan.
    for _ in 0..200 {
        let plan = schedule.next(now);
        now = plan.due_ns;
        schedule.account(plan, with_threads(150_000, 50_000));
    }
    assert!(!schedule.stretchable_scans()[1].is_stretched);
}

#[test]
fn a_focused_target_is_sampled_every_ten_milliseconds_if_that_is_cheap() {
    let (base, extra, _, share) = run(40_000, 80_000, true);
    assert_eq!(base.round(), 10.0);
    assert!(extra > 80.0, "{extra}");
    assert!(share <= 0.0105, "{share}");
}

#[test]
fn focus_samples_stay_within_the_budget() {
    let (_, extra, _, share) = run(200_000, 400_000, true);
    assert!(extra > 5.0, "{extra}");
    assert!(share <= 0.0105, "{share}");
}

#[test]
fn hundreds_of_listeners_stretch_the_base_interval() {
    let (base, _, files, share) = run(2 * MS, 10 * MS, true);
    assert!((1.9..6.0).contains(&base), "{base}");
    assert!(files > 0.03, "{files}");
    assert!(share <= 0.0115, "{share}");
}

#[test]
fn missed_samples_are_counted_and_not_made_up_for() {
    let mut schedule = schedule(Budget::default(), SECOND);
    schedule.next(SECOND);
    let late = schedule.next(9 * SECOND);
    assert_eq!(late.due_ns, 9 * SECOND);
    assert_eq!(schedule.late_samples(), 1);
    assert_eq!(schedule.next(9 * SECOND).due_ns, 9 * SECOND + 100 * MS);
}

/// A machine on which everything costs ten times as much as usual.
struct SlowMachine {
    schedule: Schedule,
    now_ns: u64,
    cpu_ns: u64,
}

impl SlowMachine {
    /// Samples for so many seconds; returns the base samples, those with a profile, and the share of a core used.
    fn run(&mut self, seconds: u64) -> (u64, u64, f64) {
        let (begun_ns, cpu_before_ns) = (self.now_ns, self.cpu_ns);
        let (mut base, mut profiles) = (0, 0);
        while self.now_ns < begun_ns + seconds * SECOND {
            let plan = self.schedule.next(self.now_ns);
            self.now_ns = plan.due_ns;
            let threads_ns = u64::from(plan.threads) * 100_000;
            let profile_ns = u64::from(plan.profile) * 500_000;
            let cost = SampleCost {
                cpu_ns: 700_000 + u64::from(plan.files) * 800_000 + threads_ns + profile_ns,
                threads_ns,
                profile_ns,
            };
            self.schedule.account(plan, cost);
            self.cpu_ns += cost.cpu_ns;
            self.schedule.measured(self.now_ns, self.cpu_ns);
            base += u64::from(plan.base);
            profiles += u64::from(plan.profile);
        }
        let used_ns = (self.cpu_ns - cpu_before_ns) as f64;
        (base, profiles, used_ns / (self.now_ns - begun_ns) as f64)
    }

    fn incident(&mut self, seconds: u64) -> (u64, u64, f64) {
        self.schedule.set_focused(true);
        self.schedule.set_spending(true, self.now_ns);
        let counts = self.run(seconds);
        self.schedule.set_spending(false, self.now_ns);
        self.schedule.set_focused(false);
        counts
    }
}

#[test]
fn saved_cpu_time_keeps_up_the_base_samples_of_incidents() {
    let mut machine = SlowMachine {
        schedule: Schedule::new(Budget::default(), SECOND),
        now_ns: SECOND,
        cpu_ns: 0,
    };
    // Scans are stretched while all is well.
    let (base, _, share) = machine.run(600);
    assert!(base < 4_000 && share < 0.0105, "{base} {share}");
    for _ in 0..2 {
        let (base, profiles, _) = machine.incident(10);
        assert!(base > 95 && profiles > 80, "{base} {profiles}");
        let (_, _, share) = machine.run(1_200);
        assert!(share < 0.0105, "{share}");
    }
    assert_eq!(machine.schedule.late_samples(), 0);
}

#[test]
fn scans_that_were_postponed_are_made_when_an_incident_begins() {
    // 20,000 sockets: a scan over files is due every few seconds.
    let mut schedule = Schedule::new(Budget::default(), SECOND);
    let mut now = SECOND;
    let mut sample = |schedule: &mut Schedule, until_ns: u64| {
        let mut scans = Vec::new();
        while now < until_ns {
            let plan = schedule.next(now);
            now = plan.due_ns;
            let files = u64::from(plan.files) * 60 * MS;
            schedule.account(plan, whole(100_000 + files));
            if plan.files {
                scans.push(now);
            }
        }
        scans
    };
    let healthy = sample(&mut schedule, 56 * SECOND);
    let last = *healthy.last().unwrap();
    schedule.set_focused(true);
    schedule.set_spending(true, 56 * SECOND);
    let next = *sample(&mut schedule, 90 * SECOND).first().unwrap();
    assert!(healthy.len() < 12, "{healthy:?}");
    assert!(
        next - last >= SECOND && next <= 56_200 * MS,
        "{last} {next}"
    );
}
