//! What Kubernetes' HorizontalPodAutoscaler decides from an external metric of type `AverageValue`. Pure.

use std::time::Duration;

/// Settings, with the defaults of Kubernetes except for the window, which the benchmark compresses.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Target of the metric per replica.
    pub target: f64,
    /// No change while the metric is within this fraction of its target.
    pub tolerance: f64,
    /// Scaling down waits until no higher number was recommended for this long.
    pub down_window: Duration,
    pub min: u32,
    pub max: u32,
}

/// The autoscaler, with its recent recommendations.
#[derive(Debug)]
pub struct Autoscaler {
    settings: Settings,
    recommended: Vec<(Duration, u32)>,
}

impl Autoscaler {
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            recommended: Vec::new(),
        }
    }

    /// The number of replicas from now on. `sum`: the metric over all replicas; `None`: unknown, so nothing changes.
    pub fn decide(&mut self, now: Duration, replicas: u32, sum: Option<f64>) -> u32 {
        let Settings {
            target,
            tolerance,
            down_window,
            min,
            max,
        } = self.settings;
        let Some(sum) = sum else {
            return replicas;
        };
        let ratio = sum / (target * f64::from(replicas));
        let desired = if (ratio - 1.0).abs() <= tolerance {
            replicas
        } else {
            (sum / target).ceil() as u32
        };
        let desired = desired.clamp(min, max);
        self.recommended
            .retain(|(at, _)| now.saturating_sub(*at) < down_window);
        self.recommended.push((now, desired));
        let highest = self.recommended.iter().map(|(_, number)| *number).max();
        if desired > replicas {
            desired
        } else {
            replicas.min(highest.unwrap_or(desired))
        }
    }
}

/// How often a sequence of numbers changes from growing to shrinking or back.
pub fn direction_changes(numbers: &[u32]) -> usize {
    let mut grew = None;
    let mut changes = 0;
    for pair in numbers.windows(2) {
        if pair[0] == pair[1] {
            continue;
        }
        let grows = pair[1] > pair[0];
        changes += usize::from(grew.is_some_and(|grew| grew != grows));
        grew = Some(grows);
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn autoscaler() -> Autoscaler {
        Autoscaler::new(Settings {
            target: 0.8,
            tolerance: 0.1,
            down_window: Duration::from_secs(10),
            min: 1,
            max: 4,
        })
    }

    #[test]
    fn it_scales_up_at_once_and_down_after_the_window() {
        let mut autoscaler = autoscaler();
        let mut at = |seconds, replicas, sum| {
            autoscaler.decide(Duration::from_secs(seconds), replicas, Some(sum))
        };
        assert_eq!(at(0, 1, 0.5), 1);
        assert_eq!(at(1, 1, 1.7), 3, "ceil(1.7 / 0.8)");
        assert_eq!(at(2, 3, 0.5), 3, "3 was recommended a second ago");
        assert_eq!(at(11, 3, 0.5), 1);
        assert_eq!(at(12, 1, 9.0), 4, "the maximum");
    }

    #[test]
    fn within_the_tolerance_or_without_a_metric_nothing_changes() {
        let mut autoscaler = autoscaler();
        let mut at = |replicas, sum| autoscaler.decide(Duration::ZERO, replicas, sum);
        assert_eq!(at(2, Some(1.75)), 2, "9% above");
        assert_eq!(at(2, Some(1.45)), 2, "9% below");
        assert_eq!(at(2, None), 2);
        assert_eq!(at(2, Some(1.8)), 3);
    }

    #[test]
    fn changes_of_direction_are_counted() {
        assert_eq!(direction_changes(&[1, 2, 2, 3, 3, 1]), 1);
        assert_eq!(direction_changes(&[1, 2, 1, 2]), 2);
        assert_eq!(direction_changes(&[2, 2]), 0);
        assert_eq!(direction_changes(&[]), 0);
    }
}
