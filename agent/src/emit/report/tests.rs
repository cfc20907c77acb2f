use super::*;
use crate::{
    detect::Event,
    diagnose::Cause,
    emit::fixture::{GATEWAY, SHOP, at, episode, gateway, look, shop, targets, verdict},
    sample::Notice,
};

fn findings(episodes: Vec<Episode>) -> Findings {
    let mut findings = Findings::default();
    findings.take(&targets());
    for episode in episodes {
        findings.take(&Event::Episode(Box::new(episode)));
    }
    findings.looked(&look(10), 40);
    findings.looked(&look(20), 41);
    findings
}

fn text_of(findings: &Findings, colour: Colour, verbosity: Verbosity) -> String {
    let mut out = Vec::new();
    write(&mut out, findings, colour, verbosity).unwrap();
    String::from_utf8(out).unwrap()
}

fn text(episodes: Vec<Episode>) -> String {
    text_of(&findings(episodes), Colour::Never, Verbosity::Normal)
}

#[test]
fn the_verdict_stands_first_then_what_speaks_for_it_then_what_to_do() {
    let expected = "";
    let text = text(vec![gateway(), shop()]);
    assert_eq!(text, expected, "\n{text}");
}
