//! Runs one target over mutants until its time is up, and keeps the input at which it fails.

use std::{
    env, fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    process,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::mutation::{Numbers, mutant};

/// A target that takes so long on one input hangs, as far as a user is concerned.
const HANGS: Duration = Duration::from_secs(20);
/// Mutants that led to something new and are changed further.
const MAX_CORPUS: usize = 2_000;

/// What is fed, and with what.
pub struct Hunt {
    pub target: &'static str,
    pub corpus: Vec<Vec<u8>>,
    /// Words of the target's language, for texts.
    pub words: &'static [&'static str],
    /// Feeds an input. What it answers tells outcomes apart: inputs with a new one are worth a further change.
    pub feed: fn(&[u8]) -> u64,
}

fn number(variable: &str, default: u64) -> u64 {
    match env::var(variable) {
        Ok(text) => text.parse().expect(variable),
        Err(_) => default,
    }
}

/// `TAILBACK_FUZZ_SECONDS` (15) of `TAILBACK_FUZZ_SEED` (1), or `TAILBACK_FUZZ_INPUT` alone.
pub fn hunt(hunt: Hunt) {
    if let Some(file) = env::var_os("TAILBACK_FUZZ_INPUT") {
        let bytes = fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let outcome = (hunt.feed)(&bytes);
        println!("{}: {} bytes lead to {outcome:x}", hunt.target, bytes.len());
        return;
    }
    let until = Instant::now() + Duration::from_secs(number("TAILBACK_FUZZ_SECONDS", 15));
    let seed = number("TAILBACK_FUZZ_SEED", 1);
    let mut numbers = Numbers::new(seed);
    let (mut corpus, mut seen) = (hunt.corpus, std::collections::BTreeSet::new());
    let guard = Guard::new(hunt.target);
    let (mut inputs, seeds) = (0_u64, corpus.len());
    while inputs < seeds as u64 || Instant::now() < until {
        // Unchanged first: a corpus that fails as it is would find nothing.
        let bytes = match corpus
            .get(inputs as usize)
            .filter(|_| inputs < seeds as u64)
        {
            Some(seed) => seed.clone(),
            None => mutant(&corpus, hunt.words, &mut numbers),
        };
        guard.begins(&bytes);
        let fed = catch_unwind(AssertUnwindSafe(|| (hunt.feed)(&bytes)));
        guard.ends();
        match fed {
            Ok(outcome) => {
                if seen.insert(outcome) && inputs >= seeds as u64 && corpus.len() < MAX_CORPUS {
                    corpus.push(bytes);
                }
            }
            Err(_) => panic!("it panics: {}", keep(hunt.target, &bytes)),
        }
        inputs += 1;
    }
    println!(
        "{}: {inputs} inputs of seed {seed}, {} different outcomes",
        hunt.target,
        seen.len()
    );
    assert!(
        seen.len() > 1,
        "every input has the same outcome: nothing is tested"
    );
}

/// Writes an input to a file, and says where and how to feed it again.
fn keep(target: &str, bytes: &[u8]) -> String {
    let file: PathBuf = env::temp_dir().join(format!("tailback-fuzz-{target}-{}", process::id()));
    let head: String = bytes
        .iter()
        .take(64)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let kept = fs::write(&file, bytes).map_or_else(
        |error| format!("cannot be written to {} ({error})", file.display()),
        |()| {
            format!(
                "TAILBACK_FUZZ_INPUT={} cargo test -p tailback --test fuzz {target}",
                file.display()
            )
        },
    );
    format!("{} bytes, beginning with {head}\n    {kept}", bytes.len())
}

/// The input that is being fed, and since when.
type AtWork = Mutex<Option<(Instant, Vec<u8>)>>;

/// Notices an input that hangs.
struct Guard {
    at_work: Arc<AtWork>,
    done: Arc<AtomicBool>,
}

impl Guard {
    fn new(target: &'static str) -> Self {
        let guard = Self {
            at_work: Arc::default(),
            done: Arc::default(),
        };
        let (at_work, done) = (Arc::clone(&guard.at_work), Arc::clone(&guard.done));
        thread::spawn(move || {
            while !done.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(200));
                if let Some((since, bytes)) = &*at_work.lock().unwrap()
                    && since.elapsed() > HANGS
                {
                    // The thread that hangs cannot be ended but with the process.
                    eprintln!(
                        "{target} takes more than {HANGS:?}: {}",
                        keep(target, bytes)
                    );
                    process::exit(101);
                }
            }
        });
        guard
    }

    fn begins(&self, bytes: &[u8]) {
        *self.at_work.lock().unwrap() = Some((Instant::now(), bytes.to_vec()));
    }

    fn ends(&self) {
        *self.at_work.lock().unwrap() = None;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
    }
}
