//! When to look at what, so that the agent stays within its CPU budget. A pure function of time and cost.
//!
//! Listeners are walked on every base tick. The walks over threads and over files join them when they can be afforded:
//! when many sockets or thousands of threads make one dear, it is the one that waits. While a queue is suspicious, what
//! is left of the budget goes into extra looks between the base ticks.
#![forbid(unsafe_code)]

use super::cpu_budget::CpuBudget;

const MS: u64 = 1_000_000;

/// How often to look, and what it may cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// Between base ticks, ns.
    pub interval_ns: u64,
    /// Between looks at a suspicious target at best, ns.
    pub hot_interval_ns: u64,
    /// Share of one core that all looks together may take.
    pub share: f64,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            interval_ns: 100 * MS,
            hot_interval_ns: 10 * MS,
            share: 0.01,
        }
    }
}

/// One tick: when, and which walks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick {
    /// CLOCK_MONOTONIC at which it is due.
    pub at_ns: u64,
    pub files: bool,
    /// Marked sockets: a walk over files sees them as well.
    pub marked: bool,
    pub threads: bool,
    /// What the threads of suspicious targets, and of those around them, wait for.
    pub profile: bool,
    /// On the base clock, not an extra look.
    pub base: bool,
    /// With everything that is otherwise looked at now and then.
    pub complete: bool,
}

/// What a tick cost, ns of CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// All of it, the pipeline and the outputs included.
    pub cpu_ns: u64,
    /// Of that, the walk over threads, and the profile.
    pub threads_ns: u64,
    pub profile_ns: u64,
}

/// The mean cost of late.
#[derive(Clone, Copy, Debug, Default)]
struct Cost(f64);

impl Cost {
    fn learn(&mut self, ns: u64) {
        // The first is taken as it is; then each counts a fifth.
        let weight = if self.0 == 0.0 { 1.0 } else { 0.2 };
        self.0 += weight * (ns as f64 - self.0);
    }
}

/// Decides the ticks.
#[derive(Debug)]
pub struct Schedule {
    budget: Budget,
    base_due_ns: u64,
    files_due_ns: u64,
    threads_due_ns: u64,
    profile_due_ns: u64,
    last_ns: u64,
    /// When the last extra look was made.
    extra_ns: u64,
    focused: bool,
    /// CPU time of a tick without and with a walk over files, the walk over threads and the profile left out.
    light: Cost,
    heavy: Cost,
    threads: Cost,
    profile: Cost,
    /// CPU time of an extra look, the profile left out, and how many there were.
    extra: Cost,
    extras: u32,
    /// Share of a core that goes into looking for targets.
    discovery: f64,
    late: u64,
    thrift: CpuBudget,
}

/// Marked sockets, and the counters of their networks, are looked at on one of so many extra looks; the profile is on all.
const MARKED_EVERY: u32 = 4;
/// Of the budget, files get at least this part, however dear the rest is: no queue may go unseen for good.
const FILES_LEAST: f64 = 0.25;
/// Files are walked at least so often.
const FILES_MAX_NS: u64 = 30_000 * MS;
/// Of the budget, base ticks without files and threads get at most this part, as long as they are not further apart than
/// this: a second is what a warning may take.
const BASE_MOST: f64 = 0.5;
const BASE_MAX_NS: u64 = 500 * MS;
/// As for files: what threads get at least, and how often they are walked at least.
const THREADS_LEAST: f64 = 0.25;
const THREADS_MAX_NS: u64 = 5_000 * MS;
/// While a queue is suspicious, this part of the budget is left to the profile and the extra looks, and files and threads wait
/// for longer if need be: what they all wait for is the question then. Profiles on base ticks keep within it.
const HOT_PART: f64 = 0.3;
/// Trials of extra looks that seem too dear: what they may take of the budget, and how far apart they are at least.
const TRIAL_PART: f64 = 0.05;
const TRIAL_NS: u64 = 500 * MS;
const PROFILE_MAX_NS: u64 = 2_000 * MS;

impl Schedule {
    /// The first tick is due at once and walks everything.
    pub fn new(budget: Budget, now_ns: u64) -> Self {
        Self {
            budget,
            base_due_ns: now_ns,
            files_due_ns: now_ns,
            threads_due_ns: now_ns,
            profile_due_ns: now_ns,
            last_ns: now_ns,
            extra_ns: now_ns,
            focused: false,
            light: Cost::default(),
            heavy: Cost::default(),
            threads: Cost::default(),
            profile: Cost::default(),
            extra: Cost::default(),
            extras: 0,
            discovery: 0.0,
            late: 0,
            thrift: CpuBudget::default(),
        }
    }

    /// The next tick, which may already be due.
    pub fn next(&mut self, now_ns: u64) -> Tick {
        let interval = self.base_interval_ns();
        if now_ns > self.base_due_ns + interval {
            // Whole ticks were missed: they are not made up for.
            self.late += 1;
            self.base_due_ns = now_ns;
        }
        if let Some(extra) = self.hot_interval_ns().or_else(|| self.trial_ns(now_ns)) {
            let at_ns = (self.last_ns + extra).max(now_ns);
            if at_ns + extra / 2 < self.base_due_ns {
                self.last_ns = at_ns;
                self.extra_ns = at_ns;
                self.extras = self.extras.wrapping_add(1);
                return Tick {
                    at_ns,
                    files: false,
                    marked: self.extras.is_multiple_of(MARKED_EVERY),
                    threads: false,
                    profile: true,
                    base: false,
                    complete: false,
                };
            }
        }
        let at_ns = self.base_due_ns.max(now_ns);
        self.base_due_ns += interval;
        self.last_ns = at_ns;
        // A walk that would be due before half of the next interval has passed is made now.
        let files = self.files_due_ns <= at_ns + interval / 2;
        if files {
            self.files_due_ns = at_ns + self.files_interval_ns();
        }
        let threads = self.threads_due_ns <= at_ns + interval / 2;
        if threads {
            self.threads_due_ns = at_ns + self.threads_interval_ns();
        }
        let profile = self.focused && self.profile_due_ns <= at_ns + interval / 2;
        if profile {
            self.profile_due_ns = at_ns + self.profile_interval_ns();
        }
        Tick {
            at_ns,
            files,
            marked: true,
            threads,
            profile,
            base: true,
            complete: false,
        }
    }

    /// What a tick cost.
    pub fn spent(&mut self, tick: Tick, spent: Spent) {
        let Spent {
            cpu_ns,
            threads_ns,
            profile_ns,
        } = spent;
        if tick.threads {
            self.threads.learn(threads_ns);
        }
        if tick.profile && profile_ns > 0 {
            self.profile.learn(profile_ns);
        }
        let rest_ns = cpu_ns.saturating_sub(threads_ns + profile_ns);
        if tick.files {
            self.heavy.learn(rest_ns);
            // A tick without files costs no more than one with them: where no such tick is made, what is known of its cost may be old.
            self.light.0 = self.light.0.min(self.heavy.0);
            self.files_due_ns = self.files_due_ns.max(tick.at_ns + self.files_interval_ns());
        } else if tick.base {
            self.light.learn(rest_ns);
        } else {
            self.extra.learn(rest_ns);
        }
        if tick.threads && tick.base {
            let next_ns = tick.at_ns + self.threads_interval_ns();
            self.threads_due_ns = self.threads_due_ns.max(next_ns);
        }
        if tick.profile && tick.base {
            let next_ns = tick.at_ns + self.profile_interval_ns();
            self.profile_due_ns = self.profile_due_ns.max(next_ns);
        }
    }

    /// What looking for targets costs, ns of CPU, and how often it is done.
    pub fn discovered(&mut self, cpu_ns: u64, every_ns: u64) {
        self.discovery += 0.2 * (cpu_ns as f64 / every_ns as f64 - self.discovery);
    }

    /// All CPU time that the agent has taken so far, but for answering, ns.
    pub fn measured(&mut self, now_ns: u64, cpu_ns: u64) {
        self.thrift.measure(now_ns, cpu_ns, self.budget.share);
    }

    /// Share of one core that is given out now: the budget, or less of it while all looks together take more.
    pub fn share(&self) -> f64 {
        self.budget.share * self.thrift.part()
    }

    /// While a queue is suspicious, ticks come closer together.
    pub fn set_focused(&mut self, focused: bool) {
        self.focused = focused;
    }

    /// The next base tick walks everything: there is something new.
    pub fn all_now(&mut self) {
        self.files_due_ns = 0;
        self.threads_due_ns = 0;
    }

    /// CPU time of a walk over files beyond what the tick costs anyway, ns.
    pub fn files_cost_ns(&self) -> u64 {
        (self.heavy.0 - self.light.0).max(0.0) as u64
    }

    /// CPU time of a walk over threads, ns.
    pub fn threads_cost_ns(&self) -> u64 {
        self.threads.0 as u64
    }

    /// CPU time of a tick without the walks over files and threads, ns.
    pub fn base_cost_ns(&self) -> u64 {
        self.light.0 as u64
    }

    /// Between base ticks, ns: the interval asked for, unless what is looked at on each of them (hundreds of listeners, the
    /// queues of all) costs too much by itself.
    pub fn base_interval_ns(&self) -> u64 {
        self.affordable_ns(self.light.0 as u64, self.share() * BASE_MOST, BASE_MAX_NS)
    }

    /// Whether base ticks are further apart than asked for.
    pub fn is_base_stretched(&self) -> bool {
        self.base_interval_ns() > self.budget.interval_ns
    }

    /// Between walks over files, ns.
    pub fn files_interval_ns(&self) -> u64 {
        let share = (self.share() - self.base_share() - self.discovery - self.hot_share())
            .max(self.share() * FILES_LEAST);
        self.affordable_ns(self.files_cost_ns(), share, FILES_MAX_NS)
    }

    /// Between walks over threads, ns.
    pub fn threads_interval_ns(&self) -> u64 {
        let light = self.light.0 / self.base_interval_ns() as f64;
        let left = self.share() * (1.0 - FILES_LEAST) - light - self.discovery - self.hot_share();
        let share = left.max(self.share() * THREADS_LEAST);
        self.affordable_ns(self.threads_cost_ns(), share, THREADS_MAX_NS)
    }

    /// Between profiles on base ticks while a queue is suspicious, ns.
    pub fn profile_interval_ns(&self) -> u64 {
        let share = self.share() * HOT_PART;
        self.affordable_ns(self.profile.0 as u64, share, PROFILE_MAX_NS)
    }

    /// What is left to extra looks and profiles, as a share of a core.
    fn hot_share(&self) -> f64 {
        if self.focused {
            self.share() * HOT_PART
        } else {
            0.0
        }
    }

    /// The shortest time between walks of such a cost that takes no more than a share of a core, on the base clock.
    fn affordable_ns(&self, cost_ns: u64, share: f64, max_ns: u64) -> u64 {
        let interval = self.budget.interval_ns;
        let wanted = cost_ns as f64 / share;
        // Rounded up; little more than one interval is one interval.
        let ticks = (wanted / interval as f64 - 0.1).ceil().max(1.0);
        ((ticks * interval as f64) as u64).min(max_ns.max(interval))
    }

    /// Share of a core that goes into base ticks without files.
    fn base_share(&self) -> f64 {
        self.light.0 / self.base_interval_ns() as f64
            + self.threads.0 / self.threads_interval_ns() as f64
    }

    /// Whether the walk over threads waits for longer than a tick.
    pub fn is_threads_stretched(&self) -> bool {
        self.threads_interval_ns() > self.budget.interval_ns
    }

    /// Whether the walk over files waits for longer than a tick.
    pub fn is_stretched(&self) -> bool {
        self.files_interval_ns() > self.budget.interval_ns
    }

    /// Between extra looks, ns; `None` while nothing is suspicious or the budget leaves no room.
    fn hot_interval_ns(&self) -> Option<u64> {
        if !self.focused {
            return None;
        }
        let files = self.files_cost_ns() as f64 / self.files_interval_ns() as f64;
        let profile = self.profile.0 / self.profile_interval_ns() as f64;
        let left = self.share() - self.base_share() - files - profile - self.discovery;
        // Until an extra look has been made, what a tick without files costs is more than it will.
        let extra = if self.extra.0 > 0.0 {
            self.extra.0
        } else {
            self.light.0
        };
        let cost = extra + self.profile.0;
        let affordable = if left > 0.0 {
            cost / left
        } else {
            f64::INFINITY
        };
        let interval = affordable.max(self.budget.hot_interval_ns as f64);
        // One look between two base ticks at least, or none.
        (interval * 1.5 <= self.base_interval_ns() as f64).then_some(interval as u64)
    }

    /// Where extra looks seem too dear, one is made now and then: what they cost is known by no other, for soon after a tick the
    /// kernel's objects are still in the caches.
    fn trial_ns(&self, now_ns: u64) -> Option<u64> {
        let cost = self.light.0 + self.profile.0;
        let apart = (cost / (self.share() * TRIAL_PART)).max(TRIAL_NS as f64);
        let is_due = self.focused && now_ns >= self.extra_ns.saturating_add(apart as u64);
        is_due.then_some(self.budget.hot_interval_ns)
    }

    /// Times that whole ticks were missed.
    pub fn late_ticks(&self) -> u64 {
        self.late
    }

    /// The budget it keeps.
    pub fn budget(&self) -> Budget {
        self.budget
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000 * MS;

    fn whole(cpu_ns: u64) -> Spent {
        with_threads(cpu_ns, 0)
    }

    fn with_threads(cpu_ns: u64, threads_ns: u64) -> Spent {
        Spent {
            cpu_ns,
            threads_ns,
            profile_ns: 0,
        }
    }

    /// Ten suspicious seconds in which a profile costs `profile_ns`, and a walk over files `files_ns` beyond the rest;
    /// answers (profiles per second, CPU share).
    fn profiles(profile_ns: u64, files_ns: u64, budget: Budget) -> (f64, f64) {
        let mut schedule = Schedule::new(budget, SECOND);
        schedule.set_focused(true);
        let (mut profiles, mut cpu) = (0, 0);
        let mut now = SECOND;
        while now < 23 * SECOND {
            let tick = schedule.next(now);
            now = tick.at_ns;
            assert!(tick.base || !tick.threads, "{tick:?}");
            let profile = u64::from(tick.profile) * profile_ns;
            let spent = Spent {
                cpu_ns: 50_000 + u64::from(tick.files) * files_ns + profile,
                threads_ns: 0,
                profile_ns: profile,
            };
            schedule.spent(tick, spent);
            if now >= 13 * SECOND {
                profiles += u64::from(tick.profile);
                cpu += spent.cpu_ns;
            }
        }
        (profiles as f64 / 10.0, cpu as f64 / 10.0 / SECOND as f64)
    }

    #[test]
    fn a_profile_that_is_cheap_is_made_a_hundred_times_a_second() {
        let (rate, share) = profiles(10_000, 100_000, Budget::default());
        assert!(rate > 95.0, "{rate}");
        assert!(share <= 0.0105, "{share}");
    }

    #[test]
    fn a_dear_profile_lowers_its_rate_by_itself() {
        let (rate, share) = profiles(200_000, 100_000, Budget::default());
        assert!((20.0..40.0).contains(&rate), "{rate}");
        assert!(share <= 0.0105, "{share}");
        let (rate, share) = profiles(10 * MS, 100_000, Budget::default());
        assert!((0.4..1.0).contains(&rate), "{rate}");
        assert!(share <= 0.0105, "{share}");
    }

    #[test]
    fn dear_walks_over_files_leave_room_for_the_profile() {
        let (rate, share) = profiles(50_000, 20 * MS, Budget::default());
        assert!(rate > 20.0, "{rate}");
        assert!(share <= 0.0115, "{share}");
    }

    #[test]
    fn looks_that_are_cheap_soon_after_another_are_found_to_be() {
        let mut schedule = Schedule::new(Budget::default(), SECOND);
        schedule.set_focused(true);
        let (mut extra, mut last, mut now) = (0, SECOND, SECOND);
        while now < 13 * SECOND {
            let tick = schedule.next(now);
            now = tick.at_ns;
            // A hundred milliseconds later nothing is in the caches any more.
            let cold = if now - last > 50 * MS {
                400_000
            } else {
                60_000
            };
            last = now;
            schedule.spent(tick, whole(cold));
            extra += u64::from(!tick.base && now >= 11 * SECOND);
        }
        assert!(extra > 100, "{extra}");
    }

    #[test]
    fn one_dear_look_does_not_put_an_end_to_the_extra_looks() {
        let mut schedule = Schedule::new(Budget::default(), SECOND);
        schedule.set_focused(true);
        let (mut extra, mut now) = (0, SECOND);
        let mut was_dear = false;
        while now < 13 * SECOND {
            let tick = schedule.next(now);
            now = tick.at_ns;
            let is_dear = !tick.base && !was_dear;
            was_dear |= is_dear;
            schedule.spent(tick, whole(if is_dear { 5 * MS } else { 100_000 }));
            extra += u64::from(!tick.base && now >= 11 * SECOND);
        }
        assert!(extra > 60, "{extra}");
    }

    #[test]
    fn a_larger_budget_buys_more_of_a_dear_profile() {
        let budget = Budget {
            share: 0.05,
            ..Budget::default()
        };
        let (rate, share) = profiles(400_000, 100_000, budget);
        assert!(rate > 80.0, "{rate}");
        assert!(share <= 0.0525, "{share}");
    }

    #[test]
    fn without_a_suspicious_queue_nothing_is_profiled() {
        let mut schedule = Schedule::new(Budget::default(), SECOND);
        let mut now = SECOND;
        for _ in 0..100 {
            let tick = schedule.next(now);
            now = tick.at_ns;
            assert!(!tick.profile);
            schedule.spent(tick, whole(50_000));
        }
    }

    /// Runs ten seconds with the given costs; answers (base ticks, extra ticks, walks over files, CPU share) per second.
    fn run(light_ns: u64, heavy_ns: u64, focused: bool) -> (f64, f64, f64, f64) {
        let mut schedule = Schedule::new(Budget::default(), SECOND);
        schedule.set_focused(focused);
        let (mut base, mut extra, mut files, mut cpu) = (0, 0, 0, 0);
        let mut now = SECOND;
        // Two seconds to learn the costs, then ten that count.
        while now < 13 * SECOND {
            let tick = schedule.next(now);
            now = tick.at_ns;
            let cost = if tick.files { heavy_ns } else { light_ns };
            schedule.spent(tick, whole(cost));
            if now >= 3 * SECOND {
                base += u64::from(tick.base);
                extra += u64::from(!tick.base);
                files += u64::from(tick.files);
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
    fn what_all_parts_take_together_is_brought_down_to_the_budget() {
        // Each part is at its least, and there is more that no part knows of.
        let mut schedule = Schedule::new(Budget::default(), SECOND);
        schedule.set_focused(true);
        let (mut cpu, mut late_cpu, mut now) = (0, 0, SECOND);
        while now < 60 * SECOND {
            let tick = schedule.next(now);
            now = tick.at_ns;
            let spent = Spent {
                cpu_ns: 500_000 + u64::from(tick.files) * 3 * MS,
                threads_ns: u64::from(tick.threads) * 4 * MS,
                profile_ns: u64::from(tick.profile) * MS,
            };
            let spent = Spent {
                cpu_ns: spent.cpu_ns + spent.threads_ns + spent.profile_ns,
                ..spent
            };
            schedule.spent(tick, spent);
            cpu += spent.cpu_ns + 300_000;
            schedule.measured(now, cpu);
            if now <= 20 * SECOND {
                late_cpu = cpu;
            }
        }
        let share = (cpu - late_cpu) as f64 / 40.0 / SECOND as f64;
        assert!((0.009..=0.0105).contains(&share), "{share}");
        // Where there is room again, all of it is given out.
        for second in 0..60 {
            schedule.measured(now + second * SECOND, cpu);
        }
        assert_eq!(schedule.share(), schedule.budget().share);
    }

    #[test]
    fn a_small_service_is_walked_whole_on_every_tick() {
        let (base, extra, files, _) = run(100_000, 300_000, false);
        assert_eq!((base.round(), extra, files.round()), (10.0, 0.0, 10.0));
    }

    #[test]
    fn many_sockets_stretch_the_walk_over_files_alone() {
        let (base, _, files, share) = run(100_000, 15 * MS, false);
        assert_eq!(base.round(), 10.0);
        assert!(files < 1.0, "{files}");
        assert!(share <= 0.0115, "{share}");
    }

    #[test]
    fn thousands_of_threads_stretch_the_walk_over_threads() {
        let mut schedule = Schedule::new(Budget::default(), SECOND);
        let (mut base, mut walks, mut files, mut cpu) = (0, 0, 0, 0);
        let mut now = SECOND;
        while now < 23 * SECOND {
            let tick = schedule.next(now);
            now = tick.at_ns;
            let threads = u64::from(tick.threads) * 5 * MS;
            let cost = 100_000 + threads + u64::from(tick.files) * 200_000;
            schedule.spent(tick, with_threads(cost, threads));
            if now >= 3 * SECOND {
                base += 1;
                walks += u64::from(tick.threads);
                files += u64::from(tick.files);
                cpu += cost;
            }
        }
        let share = cpu as f64 / 20.0 / SECOND as f64;
        assert!((199..=201).contains(&base), "{base}");
        assert!((15..40).contains(&walks), "{walks} walks over threads");
        assert!(files >= 100, "{files} walks over files");
        assert!(share <= 0.0115, "{share}");
        // When most of them have ended, it is soon back on every tick.
        for _ in 0..200 {
            let tick = schedule.next(now);
            now = tick.at_ns;
            schedule.spent(tick, with_threads(150_000, 50_000));
        }
        assert!(!schedule.is_threads_stretched());
    }

    #[test]
    fn a_suspicious_queue_is_looked_at_every_ten_milliseconds_where_that_is_cheap() {
        let (base, extra, _, share) = run(40_000, 80_000, true);
        assert_eq!(base.round(), 10.0);
        assert!(extra > 80.0, "{extra}");
        assert!(share <= 0.0105, "{share}");
    }

    #[test]
    fn extra_looks_stay_within_the_budget_too() {
        let (_, extra, _, share) = run(200_000, 400_000, true);
        assert!(extra > 5.0, "{extra}");
        assert!(share <= 0.0105, "{share}");
    }

    #[test]
    fn hundreds_of_listeners_stretch_the_ticks_themselves() {
        let (base, _, files, share) = run(2 * MS, 10 * MS, true);
        assert!((1.9..6.0).contains(&base), "{base}");
        assert!(files > 0.03, "{files}");
        assert!(share <= 0.0115, "{share}");
    }

    #[test]
    fn ticks_that_were_missed_are_counted_not_made_up_for() {
        let mut schedule = Schedule::new(Budget::default(), SECOND);
        schedule.next(SECOND);
        let late = schedule.next(9 * SECOND);
        assert_eq!(late.at_ns, 9 * SECOND);
        assert_eq!(schedule.late_ticks(), 1);
        assert_eq!(schedule.next(9 * SECOND).at_ns, 9 * SECOND + 100 * MS);
    }
}
