//! Runs one target on mutants for a given time, and saves the input on which it fails.

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

/// A target that takes longer for one input counts as hung.
const HANG_TIMEOUT: Duration = Duration::from_secs(20);
/// Limit on inputs in the corpus: the seeds, and mutants that had a new outcome.
const MAX_CORPUS: usize = 2_000;

/// A parser, and its corpus.
pub struct Target {
    pub name: &'static str,
    pub corpus: Vec<Vec<u8>>,
    /// Words to insert, for text formats.
    pub words: &'static [&'static str],
    /// Runs the parser on an input and returns a hash of the outcome. Inputs with a new outcome are mutated further.
    pub feed: fn(&[u8]) -> u64,
}

fn number(variable: &str, default: u64) -> u64 {
    match env::var(variable) {
        Ok(text) => text.parse().expect(variable),
        Err(_) => default,
    }
}

/// Fuzzes for `TAILBACK_FUZZ_SECONDS` (default 6) from `TAILBACK_FUZZ_SEED` (default 1), or runs the single input of the
/// file `TAILBACK_FUZZ_INPUT`.
pub fn fuzz(target: Target) {
    if let Some(file) = env::var_os("TAILBACK_FUZZ_INPUT") {
        let bytes = fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let outcome = (target.feed)(&bytes);
        println!("{}: {} bytes lead to {outcome:x}", target.name, bytes.len());
        return;
    }
    let until = Instant::now() + Duration::from_secs(number("TAILBACK_FUZZ_SECONDS", 6));
    let seed = number("TAILBACK_FUZZ_SEED", 1);
    let mut numbers = Numbers::new(seed);
    let (mut corpus, mut seen) = (target.corpus, std::collections::BTreeSet::new());
    let watchdog = Watchdog::new(target.name);
    let (mut inputs, seeds) = (0_u64, corpus.len());
    while inputs < seeds as u64 || Instant::now() < until {
        // The unchanged seeds come first.
        let bytes = match corpus
            .get(inputs as usize)
            .filter(|_| inputs < seeds as u64)
        {
            Some(seed) => seed.clone(),
            None => mutant(&corpus, target.words, &mut numbers),
        };
        watchdog.start(&bytes);
        let fed = catch_unwind(AssertUnwindSafe(|| (target.feed)(&bytes)));
        watchdog.stop();
        match fed {
            Ok(outcome) => {
                if seen.insert(outcome) && inputs >= seeds as u64 && corpus.len() < MAX_CORPUS {
                    corpus.push(bytes);
                }
            }
            Err(_) => panic!("panic: {}", save(target.name, &bytes)),
        }
        inputs += 1;
    }
    println!(
        "{}: {inputs} inputs of seed {seed}, {} different outcomes",
        target.name,
        seen.len()
    );
    assert!(
        seen.len() > 1,
        "every input has the same outcome: the target tests nothing"
    );
}

/// Saves an input to a file; returns how to run it again.
fn save(target: &str, bytes: &[u8]) -> String {
    let file: PathBuf = env::temp_dir().join(format!("tailback-fuzz-{target}-{}", process::id()));
    let head: String = bytes
        .iter()
        .take(64)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let saved = fs::write(&file, bytes).map_or_else(
        |error| format!("cannot be written to {} ({error})", file.display()),
        |()| {
            format!(
                "TAILBACK_FUZZ_INPUT={} cargo test -p tailback --test fuzz {target}",
                file.display()
            )
        },
    );
    format!("{} bytes, starting with {head}\n    {saved}", bytes.len())
}

/// The current input and its start time.
type Current = Mutex<Option<(Instant, Vec<u8>)>>;

/// Ends the process if an input hangs.
struct Watchdog {
    current: Arc<Current>,
    done: Arc<AtomicBool>,
}

impl Watchdog {
    fn new(target: &'static str) -> Self {
        let watchdog = Self {
            current: Arc::default(),
            done: Arc::default(),
        };
        let (current, done) = (Arc::clone(&watchdog.current), Arc::clone(&watchdog.done));
        thread::spawn(move || {
            while !done.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(200));
                if let Some((since, bytes)) = &*current.lock().unwrap()
                    && since.elapsed() > HANG_TIMEOUT
                {
                    // A hung thread can only be ended along with its process.
                    eprintln!(
                        "{target} takes more than {HANG_TIMEOUT:?}: {}",
                        save(target, bytes)
                    );
                    process::exit(101);
                }
            }
        });
        watchdog
    }

    fn start(&self, bytes: &[u8]) {
        *self.current.lock().unwrap() = Some((Instant::now(), bytes.to_vec()));
    }

    fn stop(&self) {
        *self.current.lock().unwrap() = None;
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
    }
}
