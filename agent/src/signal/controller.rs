//! From the delay of one queue, and from what comes and goes, to the share of new work to admit. Pure: time comes with each look.
//!
//! While work waits all along, what leaves over what comes tells by how much too much is admitted: `admit × departures /
//! arrivals` is the share at which both are the same. That holds whether those who are turned away never come here (a proxy
//! sheds) or come and go in no time (the service itself sheds). The delay, against the one that is fine, trims it: below the
//! balance until the queue is short. When nothing waits there is no balance to be read: the share rises, at first slowly; and
//! by the drop of what leaves where that drop is no chance, which is the end of a spike.

use std::collections::VecDeque;

/// The share is decided at most so often; and less often where the delay that is fine is long, for then so is the noise.
const PACE_NS: u64 = 100_000_000;
const PACE_MAX_NS: u64 = 1_000_000_000;
/// The delay counts when it stood for so many decisions; for fewer, where it is far too long.
const STANDING: usize = 3;
const FAR: f64 = 4.0;
/// The balance is read over so many decisions, fading.
const MEMORY: f64 = 10.0;
/// Of the balance, what is held back for each delay too long, and at most: the queue drains, and the servers do not idle.
const TRIM: f64 = 0.03;
const TRIM_MOST: f64 = 0.6;
/// What the share rises by at each decision before which nothing stood; it doubles from the third one in a row on.
const RISE: f64 = 0.01;
const DOUBLES_AFTER: u32 = 2;
const DOUBLES_MOST: u32 = 5;
/// A drop counts when chance (of counts, so the root) explains it once in a thousand times.
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
    pub target_ns: u64,
    /// What came and went since the look before is known, and in the counts.
    pub is_counted: bool,
    /// Counts that only ever rise.
    pub arrivals: u64,
    pub departures: u64,
}

/// Decides for one queue.
#[derive(Debug)]
pub struct Controller {
    admit: f64,
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
    /// Decisions in a row before which the queue was empty.
    calm: u32,
    /// Departures and time of the last two decisions' stretches, where they are known.
    recent: [Option<(f64, f64)>; 2],
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
    fn add(&mut self, admit: f64, arrived: f64, departed: f64, seconds: f64) {
        let fade = (-1.0 / MEMORY).exp();
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
}

impl Controller {
    /// Begins with everything admitted.
    pub fn new(look: Look) -> Self {
        Self {
            admit: 1.0,
            last: look,
            least_ns: u64::MAX,
            counted: true,
            delays: VecDeque::new(),
            balance: Balance::default(),
            active: false,
            calm: 0,
            recent: [None; 2],
        }
    }

    /// The share of new work to admit, [`LEAST`] to 1.
    pub fn admit(&self) -> f64 {
        self.admit
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
        let pace_ns = look.target_ns.saturating_mul(2).clamp(PACE_NS, PACE_MAX_NS);
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
        self.recent = [self.recent[1], self.counted.then_some((departed, seconds))];
        if look.delay_ns == 0 {
            self.calm = self.calm.saturating_add(1);
        } else {
            // A queue that is short for a moment is not the end of calm, nor a part of it.
            self.calm = if look.delay_ns < look.target_ns / 2 {
                self.calm / 2
            } else {
                0
            };
            if self.counted {
                self.balance.add(self.admit, arrived, departed, seconds);
            }
        }
        self.decide(look);
        self.last = look;
        self.least_ns = u64::MAX;
        self.counted = true;
    }

    fn decide(&mut self, look: Look) {
        let excess = (self.standing_ns(look.target_ns) / look.target_ns.max(1) as f64) - 1.0;
        if excess > 0.0 {
            match self.balance.share() {
                Some(share) => {
                    self.active = true;
                    self.admit = share * (1.0 - (TRIM * excess).min(TRIM_MOST));
                }
                // What comes now would wait behind what nobody takes; but one long piece of work looks like that, too.
                None if look.delay_ns >= STUCK_NS => {
                    self.active = true;
                    self.admit = LEAST;
                }
                None => {}
            }
        } else if self.active && look.delay_ns < look.target_ns {
            let doubles = self.calm.saturating_sub(DOUBLES_AFTER).min(DOUBLES_MOST);
            let rise = RISE * f64::from(1 << doubles);
            self.admit = (self.admit + rise).max(self.after_a_drop().unwrap_or(0.0));
        }
        self.admit = self.admit.clamp(LEAST, 1.0);
        if self.admit >= 1.0 && self.calm > MEMORY as u32 {
            self.active = false;
            self.balance = Balance::default();
        }
    }

    /// The delay that stood, ns: 0 where it did not stand for long enough to count.
    fn standing_ns(&self, target_ns: u64) -> f64 {
        let least = |count: usize| {
            let enough = self.delays.len() >= count;
            enough
                .then(|| self.delays.iter().rev().take(count).min())
                .flatten()
        };
        let far = least(STANDING - 1).filter(|delay| **delay as f64 > FAR * target_ns as f64);
        far.or(least(STANDING)).map_or(0.0, |delay| *delay as f64)
    }

    /// What can be admitted when so much less leaves than while work waited, and nothing waits.
    fn after_a_drop(&self) -> Option<f64> {
        let [(departed_1, seconds_1), (departed_2, seconds_2)] = [self.recent[0]?, self.recent[1]?];
        let (departed, seconds) = (departed_1 + departed_2, seconds_1 + seconds_2);
        if self.calm == 0 || self.balance.seconds <= 1.5 * seconds {
            return None;
        }
        let could = self.balance.departed / self.balance.seconds * seconds;
        let is_no_chance = could - departed > NO_CHANCE * could.max(1.0).sqrt();
        is_no_chance.then(|| self.admit * could / departed.max(1.0))
    }
}

#[cfg(test)]
mod tests;
