//! Forecasts when a queue will be full: a least-squares line through the fill ratios of the last two seconds.

use std::collections::VecDeque;

/// How far back the line reaches, ns.
const SPAN_NS: u64 = 2_000_000_000;

/// Minimum distance of two points, ns: closer ones cost time and do not improve the line.
const SPACING_NS: u64 = 45_000_000;

/// Minimum number of points for a forecast.
const MIN_POINTS: usize = 5;

/// The slope has to be this many times its standard error (4σ).
const SIGNIFICANCE_SIGMAS: f64 = 4.0;

/// Forecasts beyond one hour are not reported, ns.
const HORIZON_NS: f64 = 3_600e9;

/// The recent fill ratios of one queue.
#[derive(Debug, Default)]
pub(super) struct Trend {
    points: VecDeque<(u64, f64)>,
}

impl Trend {
    pub(super) fn add(&mut self, now_ns: u64, fill: f64) {
        if self
            .points
            .back()
            .is_some_and(|(last, _)| now_ns.saturating_sub(*last) < SPACING_NS)
        {
            return;
        }
        self.points.push_back((now_ns, fill));
        while self
            .points
            .front()
            .is_some_and(|(at, _)| now_ns.saturating_sub(*at) > SPAN_NS)
        {
            self.points.pop_front();
        }
    }

    /// Time from `now_ns` until the fill ratio reaches 1, ns; `None` if it does not rise significantly.
    pub(super) fn time_to_full(&self, now_ns: u64) -> Option<u64> {
        if self.points.len() < MIN_POINTS {
            return None;
        }
        let count = self.points.len() as f64;
        let x = |at: u64| (at as f64) - (now_ns as f64);
        let mean_x = self.points.iter().map(|(at, _)| x(*at)).sum::<f64>() / count;
        let mean_y = self.points.iter().map(|(_, fill)| fill).sum::<f64>() / count;
        let (mut xx, mut xy, mut yy) = (0.0, 0.0, 0.0);
        for (at, fill) in &self.points {
            let (dx, dy) = (x(*at) - mean_x, fill - mean_y);
            xx += dx * dx;
            xy += dx * dy;
            yy += dy * dy;
        }
        if xx == 0.0 {
            return None;
        }
        let slope = xy / xx;
        let residual = (yy - slope * xy).max(0.0);
        let error = (residual / (count - 2.0) / xx).sqrt();
        if slope <= 0.0 || slope < SIGNIFICANCE_SIGMAS * error {
            return None;
        }
        let fill_now = mean_y - slope * mean_x;
        let left = (1.0 - fill_now) / slope;
        (left < HORIZON_NS).then_some(left.max(0.0) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::Trend;

    const TICK: u64 = 100_000_000;

    #[test]
    fn a_steady_fill_is_forecast_exactly() {
        let mut trend = Trend::default();
        for tick in 0..=25 {
            trend.add(tick * TICK, tick as f64 / 50.0);
        }
        let left = trend.time_to_full(25 * TICK).unwrap() as f64 / 1e9;
        assert!((left - 2.5).abs() < 0.01, "{left}");
    }

    #[test]
    fn a_steady_or_draining_queue_has_no_forecast() {
        let mut steady = Trend::default();
        let mut draining = Trend::default();
        for tick in 0..=25 {
            steady.add(tick * TICK, if tick % 2 == 0 { 0.4 } else { 0.6 });
            draining.add(tick * TICK, 1.0 - tick as f64 / 50.0);
        }
        assert_eq!(steady.time_to_full(25 * TICK), None);
        assert_eq!(draining.time_to_full(25 * TICK), None);
    }
}
