//! From the delay of one queue, and from what comes and goes, to the share of new work to admit. Pure: time comes with each look.
//!
//! While work waits all along, what leaves over what comes tells by how much too much is admitted: `admit × departures /
//! arrivals` is the share at which both are the same. That holds whether those who are turned away never come here (a proxy
//! sheds) or come and go in no time (the service itself sheds). The delay, against the one that is fine, trims it: below the
//! balance until the queue is short; then it goes back to it. When nothing waits there is no balance to be read. What works is
//! then less busy than it was while work waited, or it is not: by that the share rises at once, which is the end of a spike,
//! or as good as not at all. Where it is not known how busy it is, the share rises faster and faster.

use std::collections::VecDeque;

/// The share is decided at most so often; and less often where the delay that is fine is long, for then so is the noise.
const PACE_NS: u64 = 100_000_000;
const PACE_MAX_NS: u64 = 1_000_000_000;
/// The delay counts when it stood for so many decisions; for fewer, where it is far too long.
const STANDING: usize = 3;
const FAR: f64 = 4.0;
/// The balance is read over so many decisions, fading; those at which the share changed by no more than this part of it.
const MEMORY: f64 = 10.0;
const STEADY: f64 = 0.05;
/// Of the balance so much is held back that what is too long drains in this time; and at most so much of it.
const DRAIN_NS: f64 = 4e8;
const TRIM_MOST: f64 = 0.9;
/// What is taken off the balance at a decision at which the delay is not shorter than before, when it was too long at more than so
/// many.
const LEAN: f64 = 0.02;
const STAYS: u32 = 10;
/// While nothing stands the share goes to this part of the balance, and from there on rises by so much of itself.
const NEAR: f64 = 0.93;
const CREEP: f64 = 0.005;
/// Where it is not known how busy the service is: what the share rises by; it doubles from the third decision in a row on.
const RISE: f64 = 0.01;
const DOUBLES_AFTER: u32 = 2;
const DOUBLES_MOST: u32 = 5;
/// While nothing waits, what is less busy than it was while work waited is idle, where over one to so many decisions chance (of
/// counts, so the root) explains it once in fifteen times.
const IDLE_OVER: usize = 5;
const HARDLY_CHANCE: f64 = 1.5;
/// Where that ends more than a share that is right for now: over up to so many, once in a hundred and fifty.
const OVER_OVER: usize = 10;
const RARELY_CHANCE: f64 = 2.5;
/// At most so much more at once.
const JUMP: f64 = 1.5;
/// Less is too little to go by.
const QUIET: f64 = 0.02;
/// A change of what leaves counts when chance explains it once in a thousand times.
const NO_CHANCE: f64 = 3.0;
/// Never less is admitted: who is turned away for good cannot show that things are better.
pub const LEAST: f64 = 0.05;
/// Nobody takes any work when none was taken for so long.
const STUCK_NS: u64 = 1_000_000_000;
/// Decisions without anything to shed after which all is forgotten.
const FORGET: u32 = 50;

/// A queue, as the controller sees it at one look.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    /// CLOCK_MONOTONIC, ns.
    pub now_ns: u64,
    /// The delay that counts against the queue, and the one that is fine, ns.
    pub delay_ns: u64,
    pub target_delay_ns: u64,
    /// Whoever turns away by how long work waited lets it wait for so long, ns, while there is too much.
    pub max_queue_wait_ns: u64,
    /// What came and went since the look before is known, and in the counts.
    pub is_counted: bool,
    /// Counts that only ever rise.
    pub arrivals: u64,
    pub departures: u64,
    /// Of what does the service's work: the share that was at work lately.
    pub utilization: Option<f64>,
}

/// Decides for one queue.
#[derive(Debug)]
pub struct Controller {
    admit: f64,
    /// Until the last decision but one.
    admit_before: f64,
    /// The last decision's look.
    last: Look,
    /// The shortest delay at the looks since then: what empties for a moment does not stand.
    least_ns: u64,
    /// All of them knew what came and went.
    counted: bool,
    /// The shortest delays before the last decisions.
    delays: VecDeque<u64>,
    balance: Balance,
    /// Whether there is anything to shed.
    active: bool,
    /// The delay was too long, and since then what works was not seen idle.
    is_too_much: bool,
    /// Decisions in a row before which the queue was empty; half of them, after one at which it was short.
    calm: u32,
    /// And before which the delay was too long.
    too_long: u32,
    /// The last two decisions' stretches, where what came and went is known.
    recent: [Option<Stretch>; 2],
    /// How busy it is while work waits, on the mean; and before the last decisions, with how long that was, s.
    busy_at_most: Option<f64>,
    busy: VecDeque<(f64, f64)>,
}

/// What came and went between two decisions.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    admit: f64,
    /// In the stretch before.
    admit_before: f64,
    arrived: f64,
    departed: f64,
    seconds: f64,
}

/// What comes and goes while work waits.
#[derive(Debug, Default)]
struct Balance {
    /// Departures, each times the share then admitted; and arrivals.
    admitted: f64,
    arrived: f64,
    departed: f64,
    seconds: f64,
}

impl Balance {
    fn add(&mut self, stretch: Stretch) {
        let fade = (-1.0 / MEMORY).exp();
        let Stretch {
            admit,
            arrived,
            departed,
            seconds,
            ..
        } = stretch;
        self.admitted = self.admitted * fade + admit * departed;
        self.arrived = self.arrived * fade + arrived;
        self.departed = self.departed * fade + departed;
        self.seconds = self.seconds * fade + seconds;
    }

    /// The share at which as much leaves as comes; `None` where nothing leaves, so that there is no balance.
    fn share(&self) -> Option<f64> {
        if self.departed <= 0.0 {
            return None;
        }
        let share = self.admitted / self.arrived.max(f64::MIN_POSITIVE);
        Some(share.clamp(LEAST, 1.0))
    }

    /// The share changed within these stretches, and who turns away heard of it sooner or later: the balance is between what
    /// the two make of it, give or take chance.
    fn keep_within(&mut self, stretches: &[Stretch]) {
        let (mut low, mut high, mut arrived, mut departed) = (0.0, 0.0, 0.0, 0.0);
        for stretch in stretches {
            low += stretch.admit.min(stretch.admit_before) * stretch.departed;
            high += stretch.admit.max(stretch.admit_before) * stretch.departed;
            arrived += stretch.arrived;
            departed += stretch.departed;
        }
        if arrived <= 0.0 || departed <= 0.0 || self.arrived <= 0.0 {
            return;
        }
        let chance = 1.0 + HARDLY_CHANCE / f64::sqrt(departed);
        let low = (low / arrived / chance).min(1.0);
        let high = (high / arrived * chance).clamp(low, 1.0);
        self.admitted = self.arrived * (self.admitted / self.arrived).clamp(low, high);
    }

    /// Whether these stretches are of a service that can do more, or less, than the one that this balance is of: both what
    /// leaves and what is admitted of it (one of them changes with the share) are others than chance makes them.
    fn is_another(&self, stretches: &[Stretch]) -> bool {
        let seconds: f64 = stretches.iter().map(|stretch| stretch.seconds).sum();
        if self.seconds <= 1.5 * seconds {
            return false;
        }
        let sum = |of: fn(&Stretch) -> f64| stretches.iter().map(of).sum::<f64>();
        let off = |now: f64, was: f64| {
            let expected = was / self.seconds * seconds;
            (now - expected) / expected.max(1.0).sqrt()
        };
        let left = off(sum(|stretch| stretch.departed), self.departed);
        let admitted = off(
            sum(|stretch| stretch.admit * stretch.departed),
            self.admitted,
        );
        left.abs().min(admitted.abs()) > NO_CHANCE && (left > 0.0) == (admitted > 0.0)
    }
}

impl Controller {
    /// Begins with everything admitted.
    pub fn new(look: Look) -> Self {
        Self {
            admit: 1.0,
            admit_before: 1.0,
            last: look,
            least_ns: u64::MAX,
            counted: true,
            delays: VecDeque::new(),
            balance: Balance::default(),
            active: false,
            is_too_much: false,
            calm: 0,
            too_long: 0,
            recent: [None; 2],
            busy_at_most: None,
            busy: VecDeque::new(),
        }
    }

    /// The share of new work to admit, [`LEAST`] to 1.
    pub fn admit(&self) -> f64 {
        self.admit
    }

    /// There was too much of late, and nothing has shown since that there is no more.
    pub fn is_shedding(&self) -> bool {
        self.active
    }

    /// As above; but it ends as soon as what works is less busy than it was, for whoever needs no share to begin with.
    pub fn is_too_much(&self) -> bool {
        self.active && self.is_too_much
    }

    /// Nothing was shed for a while: there is nothing to remember.
    pub fn is_idle(&self) -> bool {
        !self.active && self.calm > FORGET
    }

    /// Takes in a look; decides when it is time to.
    pub fn read(&mut self, look: Look) {
        self.least_ns = self.least_ns.min(look.delay_ns);
        self.counted &= look.is_counted;
        let elapsed_ns = look.now_ns.saturating_sub(self.last.now_ns);
        let pace_ns = look
            .target_delay_ns
            .saturating_mul(2)
            .clamp(PACE_NS, PACE_MAX_NS);
        // A look that is a little early is as good.
        if elapsed_ns < pace_ns / 10 * 9 {
            return;
        }
        let seconds = elapsed_ns as f64 / 1e9;
        let arrived = look.arrivals.saturating_sub(self.last.arrivals) as f64;
        let departed = look.departures.saturating_sub(self.last.departures) as f64;
        self.delays.push_back(self.least_ns);
        if self.delays.len() > STANDING {
            self.delays.pop_front();
        }
        let stretch = Stretch {
            admit: self.admit,
            admit_before: self.admit_before,
            arrived,
            departed,
            seconds,
        };
        // Who turns away hears of a share late: a stretch says something of the share where that was so before, too.
        let is_steady = (self.admit - self.admit_before).abs() <= STEADY * self.admit_before;
        self.admit_before = self.admit;
        self.recent = [self.recent[1], self.counted.then_some(stretch)];
        match look.utilization {
            Some(busy) => self.busy.push_back((busy, seconds)),
            None => self.busy.clear(),
        }
        if self.busy.len() > OVER_OVER {
            self.busy.pop_front();
        }
        if look.delay_ns == 0 {
            self.calm = self.calm.saturating_add(1);
        } else {
            // A queue that is short for a moment is not the end of calm, nor a part of it.
            self.calm = if look.delay_ns < look.target_delay_ns / 2 {
                self.calm / 2
            } else {
                0
            };
            if self.counted && is_steady {
                self.balance.add(stretch);
            }
            if let [Some(before), Some(now)] = self.recent {
                self.take_in(&[before, now], is_steady);
            }
            if let Some(busy) = look.utilization {
                let mean = self.busy_at_most.unwrap_or(busy);
                self.busy_at_most = Some(mean + (busy - mean) / MEMORY);
            }
        }
        self.decide(look);
        self.last = look;
        self.least_ns = u64::MAX;
        self.counted = true;
    }

    fn decide(&mut self, look: Look) {
        let standing_delay_ns = self.standing_delay_ns(look.target_delay_ns);
        // What is let wait need not drain, and is no sign that the balance is too high.
        let fine_ns = if self.is_too_much() {
            look.max_queue_wait_ns.max(look.target_delay_ns)
        } else {
            look.target_delay_ns
        };
        let excess_ns = standing_delay_ns - fine_ns as f64;
        if excess_ns > 0.0 {
            self.too_long = self.too_long.saturating_add(1);
            self.is_too_much = true;
            // It stays too long at what is taken for the balance: that is above it.
            if self.too_long > STAYS && look.delay_ns >= self.last.delay_ns {
                self.balance.admitted *= 1.0 - LEAN;
            }
            match self.balance.share() {
                Some(share) => {
                    self.active = true;
                    self.admit = share * (1.0 - (excess_ns / DRAIN_NS).min(TRIM_MOST));
                }
                // What comes now would wait behind what nobody takes; but one long piece of work looks like that, too.
                None if look.delay_ns >= STUCK_NS => {
                    self.active = true;
                    self.admit = LEAST;
                }
                None => {}
            }
        } else if standing_delay_ns > look.target_delay_ns as f64 {
            self.too_long = 0;
            self.admit = self.balance.share().unwrap_or(self.admit);
        } else {
            self.too_long = 0;
            if self.active && look.delay_ns < look.target_delay_ns {
                self.rise();
            }
        }
        self.admit = self.admit.clamp(LEAST, 1.0);
        if self.admit >= 1.0 && self.calm > MEMORY as u32 {
            self.active = false;
            self.balance = Balance::default();
        }
    }

    /// The delay that stood, ns: 0 where it did not stand for long enough to count.
    fn standing_delay_ns(&self, target_delay_ns: u64) -> f64 {
        let least = |count: usize| {
            let enough = self.delays.len() >= count;
            enough
                .then(|| self.delays.iter().rev().take(count).min())
                .flatten()
        };
        let far = least(STANDING - 1).filter(|delay| **delay as f64 > FAR * target_delay_ns as f64);
        far.or(least(STANDING)).map_or(0.0, |delay| *delay as f64)
    }

    /// Nothing stands.
    fn rise(&mut self) {
        let Some(most) = self.busy_at_most.filter(|most| *most >= QUIET) else {
            let doubles = self.calm.saturating_sub(DOUBLES_AFTER).min(DOUBLES_MOST);
            self.admit += RISE * f64::from(1 << doubles);
            return;
        };
        if self.idle(most, OVER_OVER, RARELY_CHANCE).is_some() {
            self.is_too_much = false;
        }
        self.admit = match self.idle(most, IDLE_OVER, HARDLY_CHANCE) {
            // As much more as makes it as busy as it was.
            Some(busy) => self.admit * (NEAR / busy).clamp(1.0 + CREEP, JUMP),
            None => {
                let near = NEAR * self.balance.share().unwrap_or(0.0);
                near.max(self.admit * (1.0 + CREEP))
            }
        };
    }

    /// How busy it was over up to so many decisions, of how busy it is at most, where that is less than so many deviations of chance
    /// would make it.
    fn idle(&self, most: f64, over: usize, deviations: f64) -> Option<f64> {
        // What it does in a second; of those who are turned away here nobody has work. That is too little where a proxy turns
        // them away; but a decision takes as long as a request, so that one at least could be done in it.
        let rate = self.balance.admitted / self.balance.seconds;
        let (mut seconds, mut busy) = (0.0, 0.0);
        for (at, (share, lasted)) in self.busy.iter().rev().take(over).enumerate() {
            if at as u32 >= self.calm {
                return None;
            }
            seconds += lasted;
            busy += share * lasted;
            let share = (busy / seconds / most).max(LEAST);
            let could = (rate * seconds).max(at as f64 + 1.0);
            if could * (1.0 - share) > deviations * could.max(1.0).sqrt() {
                return Some(share);
            }
        }
        None
    }

    /// The service may be able to do more, or less, than it was.
    fn take_in(&mut self, stretches: &[Stretch], is_steady: bool) {
        if !is_steady {
            self.balance.keep_within(stretches);
        } else if self.balance.is_another(stretches) {
            self.balance = Balance::default();
            for stretch in stretches {
                self.balance.add(*stretch);
            }
        }
    }
}

#[cfg(test)]
mod tests;
