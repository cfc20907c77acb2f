//! Explanations as people and programs read them.

use std::sync::Arc;

use super::{super::fixture, *};
use crate::{
    cause::Cause,
    event::{
        Activity, Verdict,
        explain::{Comparison, Condition},
    },
    queue::Kind,
};

fn check(name: &'static str, value: f64, unit: Unit, holds: Option<(Comparison, f64)>) -> Check {
    Check {
        name,
        value: Some(value),
        unit,
        condition: holds.map(|(comparison, threshold)| Condition {
            comparison,
            threshold,
            holds: comparison.holds(value, threshold),
        }),
    }
}

fn rule(cause: Cause, name: &'static str, outcome: RuleOutcome, checks: Vec<Check>) -> RuleReport {
    RuleReport {
        cause,
        rule: name,
        applies_to: "main activity downstream".to_owned(),
        outcome,
        checks,
    }
}

fn explanation() -> Explanation {
    let stopped = check(
        "time stopped",
        0.0,
        Unit::Ratio,
        Some((Comparison::MoreThan, 0.5)),
    );
    let slow = vec![
        check("response time", 950e6, Unit::Nanoseconds, None),
        check(
            "a pool is exhausted",
            0.0,
            Unit::YesNo,
            Some((Comparison::Is, 0.0)),
        ),
        check(
            "samples of the threads",
            3120.0,
            Unit::Count,
            Some((Comparison::AtLeast, 32.0)),
        ),
    ];
    Explanation {
        queue: Arc::clone(&fixture::episode("e1", fixture::SHOP, Kind::Accept, "0.0.0.0:8080").key),
        window_ns: 14_000_000_000,
        threads: 8,
        samples: 3_120,
        main_activity: Some(Activity::Downstream),
        rules: vec![
            rule(
                Cause::FdExhausted,
                "none left to accept with",
                RuleOutcome::NotApplicable,
                Vec::new(),
            ),
            rule(
                Cause::ConsumerStalled,
                "stopped for most of the time",
                RuleOutcome::DidNotFire,
                vec![stopped],
            ),
            rule(
                Cause::DownstreamSlow,
                "threads wait for responses",
                RuleOutcome::Chosen,
                slow,
            ),
        ],
    }
}

fn explained() -> Episode {
    Episode {
        verdict: Some(Arc::new(Verdict {
            explanation: Some(Arc::new(explanation())),
            ..fixture::verdict()
        })),
        ..fixture::episode("e1", fixture::SHOP, Kind::Accept, "0.0.0.0:8080")
    }
}

#[test]
fn every_rule_is_written_with_the_numbers_that_decided() {
    let mut text = Vec::new();
    let episodes = [explained()];
    let shop = Target {
        name: "shop".to_owned(),
        ..Target::default()
    };
    let targets = BTreeMap::from([(fixture::SHOP, Arc::new(shop))]);
    write(&mut text, episodes.iter(), &targets).unwrap();
    let text = String::from_utf8(text).unwrap();
    let expected = "\
Rules behind the verdict on shop accept 0.0.0.0:8080, in the order of evaluation
  8 threads, 3,120 samples in 14 s; main activity: downstream (waiting for another service)
  consumer_stalled (stopped for most of the time): did not fire
      ✗ time stopped  0.0%  > 50.0%
  downstream_slow (threads wait for responses): CHOSEN
        response time           950 ms
      ✓ a pool is exhausted     no      needs no
      ✓ samples of the threads  3,120   >= 32
  Not applicable; these rules are about
      main activity downstream              fd_exhausted (none left to accept with)

";
    assert_eq!(text, expected);
}

#[test]
fn a_verdict_that_two_episodes_share_is_explained_once() {
    let one = explained();
    let mut text = Vec::new();
    write(
        &mut text,
        [&one, &one.clone()].into_iter(),
        &BTreeMap::new(),
    )
    .unwrap();
    let text = String::from_utf8(text).unwrap();
    assert_eq!(text.matches("Rules behind").count(), 1);
}

#[test]
fn programs_get_values_thresholds_and_units() {
    let rules = rules(&explanation());
    assert_eq!(rules.len(), 3);
    assert_eq!(
        rules[1],
        json!({
            "cause": "consumer_stalled",
            "rule": "stopped for most of the time",
            "outcome": "did_not_fire",
            "applies_to": "main activity downstream",
            "checks": [{
                "name": "time stopped", "value": 0, "unit": "ratio",
                "comparison": ">", "threshold": 0.5, "holds": false,
            }],
        })
    );
    assert_eq!(
        rules[2]["checks"][1],
        json!({
            "name": "a pool is exhausted", "value": false, "unit": "bool",
            "comparison": "=", "threshold": false, "holds": true,
        })
    );
}
