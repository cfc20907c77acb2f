//! What a person should know about the watching itself. Pure.
#![forbid(unsafe_code)]

use std::{collections::BTreeSet, time::Duration};

use super::Schedule;
use crate::{sample::Notice, target::Selector, text::duration};

/// Changes of pace are told at most so often.
const PACE_NOTICE_NS: u64 = 30_000_000_000;

#[derive(Default)]
pub(super) struct Voice {
    notices: Vec<Notice>,
    unmatched: Option<Vec<Selector>>,
    /// Bounds that were told to be reached.
    told: BTreeSet<&'static str>,
    /// Of the walks over files, over threads, and of the tick itself: whether they were told to be stretched, and when.
    told_pace: [(bool, u64); 3],
}

impl Voice {
    /// What there is to say since the last time.
    pub(super) fn take(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    /// Says what names nothing, or nothing any more.
    pub(super) fn tell_unmatched(&mut self, unmatched: &[Selector]) {
        if self.unmatched.as_deref() != Some(unmatched) {
            let before = self.unmatched.take().unwrap_or_default();
            for selector in unmatched
                .iter()
                .filter(|selector| !before.contains(selector))
            {
                let (code, text) = match selector {
                    // It was there at the start, or we would not have begun.
                    Selector::Pid(pid) => ("target_ended", format!("process {pid} has ended")),
                    _ => (
                        "waiting_for_target",
                        format!("nothing matches {selector}; waiting for it to appear"),
                    ),
                };
                self.notices.push(Notice {
                    code: code.to_owned(),
                    text,
                });
            }
            self.unmatched = Some(unmatched.to_vec());
        }
    }

    /// A bound that is reached is told, once.
    pub(super) fn tell_once(&mut self, code: &'static str, text: impl Fn() -> String) {
        if self.told.insert(code) {
            self.notices.push(Notice {
                code: code.to_owned(),
                text: text(),
            });
        }
    }

    /// Something that is told whenever it is.
    pub(super) fn tell(&mut self, code: &'static str, text: String) {
        self.notices.push(Notice {
            code: code.to_owned(),
            text,
        });
    }

    /// Says when walks begin to be made less often than asked for, and when that is over.
    pub(super) fn tell_pace(&mut self, schedule: &Schedule, now_ns: u64) {
        let share = schedule.budget().share * 100.0;
        let walks = [
            (
                "files",
                "sockets and pipes",
                schedule.is_stretched(),
                schedule.files_cost_ns(),
                schedule.files_interval_ns(),
            ),
            (
                "threads",
                "threads",
                schedule.is_threads_stretched(),
                schedule.threads_cost_ns(),
                schedule.threads_interval_ns(),
            ),
            (
                "ticks",
                "listeners and suspicious sockets",
                schedule.is_base_stretched(),
                schedule.base_cost_ns(),
                schedule.base_interval_ns(),
            ),
        ];
        for (told, (what, of, stretched, cost_ns, interval_ns)) in
            self.told_pace.iter_mut().zip(walks)
        {
            if stretched == told.0 || now_ns < told.1 + PACE_NOTICE_NS {
                continue;
            }
            *told = (stretched, now_ns);
            let cost = duration(cost_ns);
            let interval = Duration::from_nanos(interval_ns);
            self.notices.push(if stretched {
                Notice {
                    code: format!("{what}_stretched"),
                    text: format!(
                        "a walk over all {of} costs {cost}: they are looked at every {interval:.1?} to stay within \
                         {share:.1}% of a core"
                    ),
                }
            } else {
                Notice {
                    code: format!("{what}_not_stretched"),
                    text: format!("{of} are looked at on every tick again"),
                }
            });
        }
    }
}
