//! One agent follows another in the same directory, as in a rolling update of a DaemonSet: no page expires.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use rustix::process::Signal;
use tailback_page::Page;
use tailback_tests::{
    agent::{Agent, Event},
    ports,
    temp::TempDir,
    wait,
};

use crate::stage::{DEADLINE, jam};

#[test]
fn the_next_agent_takes_over_the_pages_before_they_expire() -> Result<()> {
    let address = ports::local(ports::free()?).to_string();
    let _service = jam(&address, 3)?;
    let temp = TempDir::new("handover")?;
    let directory = temp.path().join("run");
    let (_, port) = address.rsplit_once(':').unwrap_or_default();
    // The default time to live is for an agent that has its CPU; beside other tests it may have to wait for one.
    let text = format!(
        "[[target]]\nport = {port}\nservice_name = \"shop\"\n[signal]\ndirectory = {directory:?}\ndirectory_wait = \"60s\"\nttl = \"6s\"\n"
    );
    let config = temp.write("tailback.toml", &text)?;
    let arguments = ["--config".as_ref(), config.as_os_str()];
    let first = Agent::run(arguments)?;
    let page = directory.join("shop/page");
    let pressure = || Page::open(&page).pressure();
    wait::until("the page", DEADLINE, || {
        Ok((pressure().pid != 0).then_some(()))
    })?;

    let (is_over, gaps) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let watch = {
        let (page, is_over, gaps) = (Page::open(&page), Arc::clone(&is_over), Arc::clone(&gaps));
        thread::spawn(move || {
            while !is_over.load(Ordering::Relaxed) {
                gaps.fetch_add(u64::from(!page.pressure().alive), Ordering::Relaxed);
                thread::sleep(Duration::from_millis(1));
            }
        })
    };
    let second = Agent::run(arguments)?;
    // It has loaded its programs once it has many descriptors, and waits.
    wait::until("the next agent to wait", DEADLINE, || {
        second.process().check_running()?;
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", second.process().pid()))?;
        Ok((descriptors.count() > 20).then_some(()))
    })?;
    thread::sleep(Duration::from_millis(500));
    second.process().check_running()?;

    let began = Instant::now();
    first.process().signal(Signal::TERM)?;
    wait::until("the page of the next agent", DEADLINE, || {
        let is_renewed = pressure().pid != 0 && first.process().ended()?.is_some();
        let unpublished = |event: &Event| event.text("code") == "not_published";
        if let Some(notice) = second.events()?.iter().find(|event| unpublished(event)) {
            bail!("{}", notice.text("text"));
        }
        Ok(is_renewed.then_some(()))
    })?;
    eprintln!("the pages had a pid again after {:?}", began.elapsed());
    is_over.store(true, Ordering::Relaxed);
    ensure!(watch.join().is_ok());
    let gaps = gaps.load(Ordering::Relaxed);
    ensure!(gaps == 0, "the page was expired {gaps} times");
    Ok(())
}
