//! The live page in a real browser.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;
use tailback_page::Page;
use tailback_tests::{
    chromium::{Browser, PROGRAM},
    needs,
    service::Service,
    temp::TempDir,
};

use crate::stage::{LONG_TTL, SUBJECT, Stage, exchange, jam};

/// Whether the page shows a badge with a level that is not ok.
const IS_NOT_OK: &str = "!!document.querySelector('#attention article .badge')";

#[test]
fn the_live_page_shows_the_jammed_service_first_with_its_cause_and_its_readers() -> Result<()> {
    const TEST: &str =
        "the_live_page_shows_the_jammed_service_first_with_its_cause_and_its_readers";
    if !needs::met(TEST, &[PROGRAM]) {
        return Ok(());
    }
    let (jammed, healthy) = (jam("127.0.0.1:0", 101)?, jam("127.0.0.1:0", 0)?);
    let more = format!(
        "{LONG_TTL}[[target]]\nport = {}\nservice_name = \"aardvark\"\n",
        healthy.address().port()
    );
    let stage = Stage::start(jammed.address().port(), &more)?;
    // This process reads the page, as the service itself would.
    let page = Page::open(stage.page());
    ensure!(page.pressure().alive, "the page is not published");
    let mut browser = Browser::start()?;
    browser.open(&format!("http://{}/", stage.http))?;
    browser.wait("the jammed service to be shown", IS_NOT_OK)?;
    browser.wait(
        "its cause",
        "document.querySelector('.path .root')?.checkVisibility() === true",
    )?;
    browser.wait(
        "the level full",
        "document.querySelector('#attention article .badge').textContent === 'full'",
    )?;
    // A search that was cut off on a busy machine is repeated after 30 s.
    browser.wait(
        "the reader of the page",
        "document.querySelector('#attention dl').innerText.includes('reads its page')",
    )?;
    browser.wait(
        "the healthy service",
        "!!document.querySelector('#ok tbody')",
    )?;
    let article = |of: &str| format!("document.querySelector('#attention article {of}').innerText");
    let mut text_of = |of: &str| -> Result<String> {
        let value = browser.evaluate(&article(of))?;
        Ok(value.as_str().context("no text")?.to_owned())
    };
    let (name, level) = (text_of("h3")?, text_of(".badge")?);
    ensure!(
        name == "shop" && level.to_lowercase() == "full",
        "{name}: {level}"
    );
    let queue = text_of(".queues tbody tr")?;
    ensure!(queue.contains("accept (full)"), "{queue}");
    ensure!(
        queue.contains("101 of 100 connections") || queue.contains("of 128"),
        "{queue}"
    );
    let facts = text_of("dl")?;
    for fact in [
        "What to do",
        "Evidence",
        "Signal",
        "Received by",
        "reads its page",
    ] {
        ensure!(facts.contains(fact), "no {fact:?} in {facts}");
    }
    let others = browser.evaluate("document.querySelector('#ok tbody').innerText")?;
    let others = others.as_str().unwrap_or_default();
    ensure!(
        others.starts_with("aardvark"),
        "worst first, not by name: {others}"
    );
    browser.wait(
        "a plot",
        "document.querySelector('.queues .area').getAttribute('d') !== ''",
    )?;

    // What a screen reader gets.
    let nodes = browser.accessible()?;
    let has = |role: &str, name: &str| nodes.iter().any(|(r, n)| r == role && n.contains(name));
    for (role, name) in [
        ("main", ""),
        ("heading", "shop"),
        ("table", "Queues of shop"),
        ("columnheader", "Wait, last 10 min"),
        ("rowheader", "accept (full)"),
        ("image", ": maximum 101"),
        ("list", "Wait chain"),
        ("button", "Pause"),
        ("status", ""),
    ] {
        ensure!(has(role, name), "no {role} {name:?} in {nodes:?}");
    }
    browser.wait(
        "an announcement",
        "document.getElementById('announcer').textContent.includes('shop is full')",
    )?;

    // By keyboard: the skip link, the pause button, the healthy service. Focus survives updates.
    for _ in 0..3 {
        browser.press("Tab", 9)?;
    }
    let focused = browser.evaluate("document.activeElement.innerText")?;
    ensure!(focused == "aardvark", "{focused}");
    let outline = browser.evaluate("getComputedStyle(document.activeElement).outlineStyle")?;
    ensure!(outline == "solid", "the focus is not visible: {outline}");
    browser.press("Enter", 13)?;
    browser.evaluate("document.before = document.getElementById('clock').textContent")?;
    browser.wait(
        "an update",
        "document.getElementById('clock').textContent !== document.before",
    )?;
    let open = browser.evaluate("document.activeElement.getAttribute('aria-expanded')")?;
    ensure!(open == "true", "aria-expanded is {open}");

    stage.agent.process().signal(Signal::KILL)?;
    browser.wait(
        "the end of the agent to be shown",
        "document.getElementById('problem').innerText.includes('all signals have failed open')",
    )?;
    ensure!(browser.problems().is_empty(), "{:?}", browser.problems());
    Ok(())
}

/// A name that tries to run a script, to hide text and to break out of an attribute.
const HOSTILE: &str =
    "<img src=x onerror=\"alert(1)\">'\"</script><script>alert(2)</script>\u{202e}\u{1b}[31m";

#[test]
fn hostile_names_are_only_text_in_the_live_page() -> Result<()> {
    const TEST: &str = "hostile_names_are_only_text_in_the_live_page";
    if !needs::met(TEST, &[PROGRAM]) {
        return Ok(());
    }
    let shop = jam("127.0.0.1:0", 0)?;
    let mut command = Command::new(SUBJECT);
    command.env("OTEL_SERVICE_NAME", HOSTILE);
    let args = ["jam", "--listen", "127.0.0.1:0", "--waiting", "101"];
    let hostile = Service::start(&mut command, &args)?;
    let stage = Stage::start_with(TempDir::new("signal")?, |temp, base| {
        let text = format!(
            "[[target]]\npid = {}\nservice_name = \"shop\"\n[[target]]\npid = {}\n{base}{LONG_TTL}",
            shop.pid(),
            hostile.pid()
        );
        temp.write("tailback.toml", &text)
    })?;
    let mut browser = Browser::start()?;
    browser.open(&format!("http://{}/", stage.http))?;
    browser.wait("the hostile service to be shown", IS_NOT_OK)?;
    browser.wait(
        "its cause",
        "document.querySelector('.path .root')?.checkVisibility() === true",
    )?;
    let name = browser.evaluate("document.querySelector('#attention h3').innerText")?;
    let name = name.as_str().unwrap_or_default();
    ensure!(name.starts_with("<img src=x"), "{name}");
    ensure!(!name.contains(['\u{202e}', '\u{1b}']), "{name:?}");
    let made = browser.evaluate("document.querySelectorAll('img, script:not([src])').length")?;
    ensure!(made == 0, "{made} elements were made from a name");
    // An attempt alone would be a violation of the policy.
    ensure!(browser.problems().is_empty(), "{:?}", browser.problems());
    for file in ["/", "/live.css", "/live.js"] {
        let (head, _) = stage.get(file)?;
        let head = head.to_lowercase();
        let policy = "content-security-policy: default-src 'none'; script-src 'self'";
        ensure!(head.contains(policy), "{file}: {head}");
        ensure!(
            head.contains("x-content-type-options: nosniff"),
            "{file}: {head}"
        );
    }
    Ok(())
}

/// DNS rebinding: a web page lets its own name resolve to 127.0.0.1. Its requests have that name as `Host`.
#[test]
fn a_web_page_whose_name_resolves_to_loopback_reads_nothing() -> Result<()> {
    const TEST: &str = "a_web_page_whose_name_resolves_to_loopback_reads_nothing";
    if !needs::met(TEST, &[PROGRAM]) {
        return Ok(());
    }
    let service = jam("127.0.0.1:0", 3)?;
    let stage = Stage::start_with(TempDir::new("signal")?, |temp, base| {
        let port = service.address().port();
        let text = format!(
            "[[target]]\nport = {port}\nservice_name = \"shop\"\n{base}http.allowed_hosts = [\"mine.localdomain\"]\n{LONG_TTL}"
        );
        temp.write("tailback.toml", &text)
    })?;
    let ask = |host: &str, path: &str| -> Result<(String, String)> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        exchange(stage.http, &request)
    };
    let port = stage.http.port();
    for path in ["/", "/live", "/pressure", "/events", "/metrics", "/status"] {
        let (head, body) = ask(&format!("evil.example:{port}"), path)?;
        ensure!(head.starts_with("HTTP/1.1 403 "), "{path}: {head}");
        ensure!(
            body.contains("allowed_hosts") && !body.contains("shop"),
            "{path}: {body}"
        );
    }
    for host in [
        "localhost",
        "127.0.0.1",
        "[::1]:80",
        "mine.localdomain:8080",
    ] {
        let (head, body) = ask(host, "/pressure")?;
        ensure!(
            head.starts_with("HTTP/1.1 200 ") && body.contains("shop"),
            "{host}: {head}"
        );
    }
    // A load balancer's health check.
    let (head, _) = ask("shop.example", "/ready?target=shop")?;
    ensure!(head.starts_with("HTTP/1.1 200 "), "{head}");

    let mut browser = Browser::start()?;
    browser.open(&format!("http://localhost:{port}/"))?;
    browser.wait(
        "the service to be shown",
        "document.body?.innerText.includes('shop') === true",
    )?;
    Ok(())
}
