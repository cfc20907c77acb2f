//! Plots goodput over load as SVG, with one panel per service.

use std::fmt::Write as _;

use super::{
    consumers::{CONSUMERS, Consumer},
    parts::PLOTTED_LOADS,
    results::Results,
    scenario::Scenario,
    service::Service,
};

const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 56.0;
const TOP: f64 = 44.0;
/// Size of a panel with its axes.
const PANEL: (f64, f64) = (WIDTH + LEFT + 24.0, TOP + HEIGHT + 56.0);
/// Panels in a row.
const COLUMNS: usize = 2;
const LEGEND: f64 = 28.0;
/// Top of the goodput axis.
const MAX_GOODPUT: f64 = 1.1;

fn colour(consumer: &Consumer) -> &'static str {
    // Palette for colour-blind readers (Okabe and Ito).
    match consumer.name {
        "nothing" => "#999999",
        "static" => "#e69f00",
        "envoy" => "#56b4e9",
        "maxconn" => "#0072b2",
        "page+maxconn" => "#d55e00",
        name if name.starts_with("page-") => "#009e73",
        _ => "#000000",
    }
}

/// Goodput at the loads that were measured, in percent of the capacity.
fn goodput(results: &Results, consumer: &Consumer, service: Service) -> Vec<(f64, f64)> {
    let at = |load| {
        let percent = results.median(consumer.name, service, Scenario::Load(load), "goodput")?;
        Some((load, percent))
    };
    PLOTTED_LOADS.into_iter().filter_map(at).collect()
}

pub fn svg(results: &Results) -> String {
    let is_measured =
        |consumer: &Consumer, service: &Service| !goodput(results, consumer, *service).is_empty();
    let panels: Vec<Service> = Service::ALL
        .into_iter()
        .filter(|service| {
            CONSUMERS
                .iter()
                .any(|consumer| is_measured(consumer, service))
        })
        .collect();
    let consumers: Vec<&Consumer> = CONSUMERS
        .iter()
        .filter(|consumer| panels.iter().any(|service| is_measured(consumer, service)))
        .collect();
    let width = panels.len().min(COLUMNS) as f64 * PANEL.0;
    let height = panels.len().div_ceil(COLUMNS) as f64 * PANEL.1 + LEGEND;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"system-ui, sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
    );
    for (index, service) in panels.iter().enumerate() {
        let (column, row) = (index % COLUMNS, index / COLUMNS);
        let at = (column as f64 * PANEL.0 + LEFT, row as f64 * PANEL.1 + TOP);
        panel(&mut text, at, *service, &consumers, results);
    }
    legend(&mut text, &consumers, height - 14.0);
    text += "</svg>\n";
    text
}

/// `at` is the top left corner of the plotted area.
fn panel(
    text: &mut String,
    at: (f64, f64),
    service: Service,
    consumers: &[&Consumer],
    results: &Results,
) {
    let (left, top) = at;
    let x = |load: f64| left + load / PLOTTED_LOADS[PLOTTED_LOADS.len() - 1] * WIDTH;
    let y = |goodput: f64| top + HEIGHT * (1.0 - goodput.min(MAX_GOODPUT) / MAX_GOODPUT);
    let _ = writeln!(
        text,
        "<text x=\"{left}\" y=\"{}\" font-weight=\"600\">{}</text>",
        top - 24.0,
        service.name()
    );
    let _ = writeln!(
        text,
        "<text x=\"{left}\" y=\"{}\" fill=\"#555\">good responses, % of capacity</text>",
        top - 8.0
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
    for load in PLOTTED_LOADS {
        let _ = writeln!(
            text,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\" fill=\"#555\">{load}×</text>",
            x(load),
            top + HEIGHT + 18.0
        );
    }
    let _ = writeln!(
        text,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\" fill=\"#555\">offered load, multiple of capacity</text>",
        left + WIDTH / 2.0,
        top + HEIGHT + 36.0
    );
    for consumer in consumers {
        let points: Vec<(f64, f64)> = goodput(results, consumer, service)
            .into_iter()
            .map(|(load, percent)| (x(load), y(percent / 100.0)))
            .collect();
        if points.is_empty() {
            continue;
        }
        let colour = colour(consumer);
        let line: Vec<String> = points
            .iter()
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        let _ = writeln!(
            text,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2.5\"/>",
            line.join(" ")
        );
        for (x, y) in points {
            let _ = writeln!(
                text,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\"/>"
            );
        }
    }
}

fn legend(text: &mut String, consumers: &[&Consumer], at: f64) {
    for (index, consumer) in consumers.iter().enumerate() {
        let x = LEFT + index as f64 * 150.0;
        let _ = writeln!(
            text,
            "<path d=\"M{x} {}h22\" stroke=\"{}\" stroke-width=\"3\"/><text x=\"{}\" y=\"{at}\">{}</text>",
            at - 4.0,
            colour(consumer),
            x + 28.0,
            consumer.name
        );
    }
}
