//! SCRAM-SHA-256 (RFC 5802, RFC 7677): a login that does not reveal the password, and proves that the server knows it, too.

use std::{fs::File, io::Read as _};

use anyhow::{Context as _, Result, bail, ensure};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use sha2::{Digest as _, Sha256};

/// Name of the mechanism.
pub const MECHANISM: &str = "SCRAM-SHA-256";
/// Most rounds that a server may ask for: 40 ms of CPU time. PostgreSQL and PgBouncer ask for 4,096.
const MAX_ROUNDS: u32 = 100_000;
/// Block of SHA-256, bytes.
const BLOCK: usize = 64;

type Hash = [u8; 32];

/// One login.
pub struct Login {
    password: String,
    nonce: String,
    /// The first message without its head.
    first: String,
}

/// What the server must send at the end.
pub struct Signature(Hash);

impl Login {
    /// A login with a random nonce. PostgreSQL takes the user from the start of the session.
    pub fn new(password: &str) -> Result<Self> {
        let mut random = [0; 18];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        Ok(Self::with(password, "", &BASE64_STANDARD.encode(random)))
    }

    fn with(password: &str, user: &str, nonce: &str) -> Self {
        Self {
            password: password.to_owned(),
            nonce: nonce.to_owned(),
            first: format!("n={user},r={nonce}"),
        }
    }

    /// The first message.
    pub fn first(&self) -> String {
        format!("n,,{}", self.first)
    }

    /// The reply to the server's first message, and its expected signature.
    pub fn reply(&self, server: &[u8]) -> Result<(String, Signature)> {
        let server = std::str::from_utf8(server).context("invalid SCRAM message")?;
        let field = |name: &str| {
            let mut fields = server.split(',');
            let found = fields.find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
            found.with_context(|| format!("a SCRAM message lacks {name}"))
        };
        let nonce = field("r")?;
        ensure!(
            nonce.starts_with(&self.nonce) && nonce.len() > self.nonce.len(),
            "a SCRAM message has another nonce"
        );
        let salt = BASE64_STANDARD.decode(field("s")?)?;
        let rounds: u32 = field("i")?.parse()?;
        ensure!(
            (1..=MAX_ROUNDS).contains(&rounds),
            "SCRAM with {rounds} rounds"
        );
        let salted = salted(self.password.as_bytes(), &salt, rounds);
        let last = format!("c=biws,r={nonce}");
        let all = format!("{},{server},{last}", self.first);
        let client_key = hmac(&salted, b"Client Key");
        let stored_key: Hash = Sha256::digest(client_key).into();
        let mut proof = hmac(&stored_key, all.as_bytes());
        xor(&mut proof, &client_key);
        let signature = hmac(&hmac(&salted, b"Server Key"), all.as_bytes());
        let reply = format!("{last},p={}", BASE64_STANDARD.encode(proof));
        Ok((reply, Signature(signature)))
    }
}

impl Signature {
    /// Fails unless the server knows the password.
    pub fn check(&self, server: &[u8]) -> Result<()> {
        let text = std::str::from_utf8(server).context("invalid SCRAM message")?;
        if let Some(error) = text.strip_prefix("e=") {
            bail!("SCRAM: {}", crate::text::harmless(error));
        }
        let sent = text.strip_prefix("v=").context("invalid SCRAM message")?;
        let sent = BASE64_STANDARD.decode(sent)?;
        ensure!(
            sent == self.0,
            "the server did not prove that it knows the password: it may be an impostor"
        );
        Ok(())
    }
}

/// PBKDF2 with one block.
fn salted(password: &[u8], salt: &[u8], rounds: u32) -> Hash {
    let mut last = hmac(password, &[salt, &[0, 0, 0, 1]].concat());
    let mut all = last;
    for _ in 1..rounds {
        last = hmac(password, &last);
        xor(&mut all, &last);
    }
    all
}

fn hmac(key: &[u8], message: &[u8]) -> Hash {
    let mut block = [0; BLOCK];
    if key.len() > BLOCK {
        block[..32].copy_from_slice(&Sha256::digest(key));
    } else {
        block[..key.len()].copy_from_slice(key);
    }
    let padded = |with: u8| block.map(|byte| byte ^ with);
    let inner = Sha256::new()
        .chain_update(padded(0x36))
        .chain_update(message)
        .finalize();
    let outer = Sha256::new().chain_update(padded(0x5c)).chain_update(inner);
    outer.finalize().into()
}

fn xor(into: &mut Hash, with: &Hash) {
    for (byte, with) in into.iter_mut().zip(with) {
        *byte ^= with;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of RFC 7677.
    const NONCE: &str = "rOprNGfwEbeRWgbNEkqO";
    const SERVER: &str =
        "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";

    #[test]
    fn the_example_of_the_specification_is_followed() {
        let login = Login::with("pencil", "user", NONCE);
        assert_eq!(login.first(), "n,,n=user,r=rOprNGfwEbeRWgbNEkqO");
        let (reply, signature) = login.reply(SERVER.as_bytes()).unwrap();
        assert_eq!(
            reply,
            "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
        );
        let last = b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=";
        signature.check(last).unwrap();
        assert!(signature.check(b"v=AAAA").is_err());
        assert!(signature.check(b"e=invalid-proof").is_err());
    }

    #[test]
    fn messages_of_a_hostile_server_are_refused() {
        let login = Login::with("pencil", "user", NONCE);
        for server in [
            "",
            "r=other,s=W22Z,i=4096",
            &SERVER.replace("4096", "4000000000"),
            &SERVER.replace("4096", "99999999"),
            &SERVER.replace("4096", "0"),
            &SERVER.replace("W22Z", "?"),
            &format!("r={NONCE},s=W22Z,i=4096"),
        ] {
            assert!(login.reply(server.as_bytes()).is_err(), "{server}");
        }
        let long = Login::with(&"p".repeat(100), "", NONCE);
        assert!(long.reply(SERVER.as_bytes()).is_ok());
        assert_ne!(
            Login::new("x").unwrap().nonce,
            Login::new("x").unwrap().nonce
        );
    }
}
