//! Parses the console output of the first process of a test kernel.

use anyhow::{Context as _, Result, bail};

use tailback_tests::accuracy::Finding;

use super::protocol::{ACCURACY, BYE, BYTES, CHECK, CHECKS, END, HELLO, PLAN, sum};

/// The result of one check.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Ok,
    Failed(String),
    /// The console has no line about it.
    Absent,
}

/// Each check with its verdict.
pub fn verdicts(console: &str) -> Vec<(&'static str, Verdict)> {
    let said = |check: &str| {
        let mut words = console
            .lines()
            .filter_map(|line| line.strip_prefix(CHECK)?.strip_prefix(' '));
        words.find_map(|line| {
            if line.strip_prefix("ok ") == Some(check) {
                return Some(Verdict::Ok);
            }
            let why = line
                .strip_prefix("failed ")?
                .strip_prefix(check)?
                .strip_prefix(": ")?;
            Some(Verdict::Failed(why.to_owned()))
        })
    };
    CHECKS
        .iter()
        .map(|check| (*check, said(check).unwrap_or(Verdict::Absent)))
        .collect()
}

/// The measurements. A line that the kernel's own output has broken is dropped, so that its row counts as missing.
pub fn findings(console: &str) -> Vec<Finding> {
    let lines = console
        .lines()
        .filter_map(|line| line.strip_prefix(ACCURACY)?.strip_prefix(' '));
    lines.filter_map(Finding::from_json).collect()
}

/// The output of `tailback doctor`.
pub fn plan(console: &str) -> impl Iterator<Item = &str> {
    let lines = console.lines();
    lines.filter_map(|line| line.strip_prefix(PLAN)?.strip_prefix(' '))
}

/// The result of a command.
pub struct Output {
    /// Its standard output.
    pub bytes: Vec<u8>,
    pub status: i32,
    /// The rest of the console: standard error and kernel messages.
    pub other: Vec<String>,
}

pub fn output(console: &str) -> Result<Output> {
    let mut bytes = Vec::new();
    let mut end = None;
    let mut other = Vec::new();
    // The kernel's power-off messages follow.
    let console = console.split(BYE).next().unwrap_or_default();
    for line in console.lines() {
        match line.split_once(' ') {
            Some((BYTES, digits)) => bytes.extend(decode(digits)?),
            Some((END, numbers)) => end = Some(numbers),
            _ if line.starts_with(HELLO) || line.is_empty() => {}
            _ => other.push(line.to_owned()),
        }
    }
    let end = end.context("the console has no end of the command's output")?;
    let numbers: Option<Vec<i64>> = end.split(' ').map(|number| number.parse().ok()).collect();
    let Some([count, total, status]) = numbers.as_deref() else {
        bail!("the end of the command's output is garbled: {end:?}");
    };
    if usize::try_from(*count)? != bytes.len() || *total != i64::from(sum(&bytes)) {
        bail!(
            "the command printed {count} bytes, of which {} arrived, or some were changed",
            bytes.len()
        );
    }
    Ok(Output {
        bytes,
        status: i32::try_from(*status)?,
        other,
    })
}

fn decode(digits: &str) -> Result<Vec<u8>> {
    let byte = |at: usize| {
        digits
            .get(at..at + 2)
            .and_then(|pair| u8::from_str_radix(pair, 16).ok())
    };
    let bytes: Option<Vec<u8>> = (0..digits.len()).step_by(2).map(byte).collect();
    bytes.with_context(|| format!("a line of bytes is garbled: {digits:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_that_the_console_does_not_mention_is_absent() {
        let parsed = |text| -> Vec<_> {
            let all = verdicts(text).into_iter();
            all.filter(|(_, verdict)| *verdict != Verdict::Absent)
                .collect()
        };
        assert!(parsed("HELLO from 6.1\n[ 2.0] CHECK ok doctor\n").is_empty());
        assert_eq!(
            parsed("HELLO from 6.1\nCHECK ok doctor\n"),
            [("doctor", Verdict::Ok)]
        );
        assert_eq!(
            parsed("CHECK failed doctor: no helper\n"),
            [("doctor", Verdict::Failed("no helper".to_owned()))]
        );
        assert_eq!(verdicts("").len(), CHECKS.len());
    }

    #[test]
    fn a_finding_that_the_kernel_wrote_into_is_left_out() {
        let row = &tailback_tests::accuracy::ROWS[0];
        let whole = Finding::without_numbers(row, tailback_tests::accuracy::Verdict::Ok, "");
        let line = format!("{ACCURACY} {}", whole.to_json());
        let (start, end) = line.split_at(30);
        let console = format!("{line}\n{start}[ 3.1] hm\n{end}\n");
        assert_eq!(findings(&console), [whole]);
    }

    #[test]
    fn bytes_come_through_among_other_lines() -> Result<()> {
        let total = sum(b"ab\n");
        let output = output(&format!(
            "HELLO from 6.1\nBYTES 6162\n[ 1.0] hm\nBYTES 0a\nEND 3 {total} 7\nBYE\n"
        ))?;
        assert_eq!(
            (output.bytes.as_slice(), output.status),
            (b"ab\n".as_slice(), 7)
        );
        assert_eq!(output.other, ["[ 1.0] hm"]);
        Ok(())
    }

    #[test]
    fn a_lost_line_is_noticed() {
        let total = sum(b"ab\n");
        assert!(output(&format!("BYTES 6162\nEND 3 {total} 0\n")).is_err());
        assert!(output("BYTES 6162\n").is_err());
    }
}
