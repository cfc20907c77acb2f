//! Plots goodput over load as SVG, with one panel per service.

use std::fmt::Write as _;

use super::{
    LOADS,
    samples::{Of, Samples, What, When},
    stage::{Guard, Service},
};

const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 56.0;
const TOP: f64 = 44.0;
/// Top of the goodput axis.
const MAX_GOODPUT: f64 = 1.1;

fn colour(guard: Guard) -> &'static str {
    // Palette for colour-blind readers (Okabe and Ito).
    match guard {
        Guard::Nobody => "#999999",
        Guard::Static => "#e69f00",
        Guard::Maxconn => "#0072b2",
        Guard::Weight => "#56b4e9",
        Guard::Share => "#cc79a7",
        Guard::Page => "#009e73",
    }
}

pub fn svg(samples: &Samples) -> String {
    let panels = samples.services();
    let width = panels.len() as f64 * (WIDTH + LEFT + 24.0);
    let height = TOP + HEIGHT + 84.0;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"system-ui, sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    for (index, service) in panels.iter().enumerate() {
        panel(
            &mut text,
            index as f64 * (WIDTH + LEFT + 24.0) + LEFT,
            *service,
            samples,
        );
    }
    legend(&mut text, samples, height - 14.0);
    text += "</svg>\n";
    text
}

fn panel(text: &mut String, left: f64, service: Service, samples: &Samples) {
    let x = |load: f64| left + load / LOADS[LOADS.len() - 1] * WIDTH;
    let y = |goodput: f64| TOP + HEIGHT * (1.0 - goodput.min(MAX_GOODPUT) / MAX_GOODPUT);
    let _ = writeln!(
        text,
        "<text x=\"{left}\" y=\"20\" font-weight=\"600\">{}</text>",
        service.name()
    );
    let _ = writeln!(
        text,
        "<text x=\"{left}\" y=\"36\" fill=\"#555\">good responses, % of capacity</text>"
    );
    for percent in [0, 25, 50, 75, 100] {
        let at = y(f64::from(percent) / 100.0);
        let _ = writeln!(
            text,
            "<path d=\"M{left} {at}h{WIDTH}\" stroke=\"#ddd\"/><text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"#555\">{percent}%</text>",
            left - 6.0,
            at + 4.0
        );
    }
    for load in LOADS {
        let _ = writeln!(
            text,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\" fill=\"#555\">{load}×</text>",
            x(load),
            TOP + HEIGHT + 18.0
        );
    }
    let _ = writeln!(
        text,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\" fill=\"#555\">offered load, multiple of capacity</text>",
        left + WIDTH / 2.0,
        TOP + HEIGHT + 36.0
    );
    for guard in Guard::ALL {
        let point = |load: f64| {
            let (when, what) = (When::Load(load), What::Goodput);
            let percent = samples.median(Of {
                service,
                guard,
                when,
                what,
            })?;
            Some(format!("{:.1},{:.1}", x(load), y(percent / 100.0)))
        };
        let points: Vec<String> = LOADS.into_iter().filter_map(point).collect();
        if points.is_empty() {
            continue;
        }
        let colour = colour(guard);
        let _ = writeln!(
            text,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2.5\"/>",
            points.join(" ")
        );
        for point in points {
            let (x, y) = point.split_once(',').unwrap_or_default();
            let _ = writeln!(
                text,
                "<circle cx=\"{x}\" cy=\"{y}\" r=\"3.5\" fill=\"{colour}\"/>"
            );
        }
    }
}

fn legend(text: &mut String, samples: &Samples, at: f64) {
    let guards = Guard::ALL.into_iter().filter(|guard| samples.has(*guard));
    for (index, guard) in guards.enumerate() {
        let x = LEFT + index as f64 * 150.0;
        let _ = writeln!(
            text,
            "<path d=\"M{x} {}h22\" stroke=\"{}\" stroke-width=\"3\"/><text x=\"{}\" y=\"{at}\">{}</text>",
            at - 4.0,
            colour(guard),
            x + 28.0,
            guard.name()
        );
    }
}
