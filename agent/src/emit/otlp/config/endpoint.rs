//! The collector's URL, as people write it, made exact.

use std::fmt;

use http::Uri;

use super::{ConfigError, Environment, Protocol, protocol, wrong};

const TRACES_PATH: &str = "/v1/traces";

/// Whether `v1/traces` is appended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Always appended.
    Base,
    /// Never.
    Whole,
    /// Where it is missing: a person may paste either.
    BaseOrWhole,
}

/// An endpoint as it was written, and where.
pub struct Given<'a> {
    setting: &'a str,
    url: String,
    form: Form,
}

impl<'a> Given<'a> {
    pub fn new(setting: &'a str, url: &str, form: Form) -> Self {
        let url = url.trim().to_owned();
        Self { setting, url, form }
    }

    /// The URL that requests go to, and what is spoken there.
    pub fn resolve(&self, env: &Environment<'_>) -> Result<(Uri, Protocol), ConfigError> {
        let wanted = protocol(env)?;
        let (scheme, rest, by_scheme) = self.scheme(wanted, env)?;
        let rest = if by_scheme && !has_port(rest) {
            with_port(rest, 4317)
        } else {
            rest.to_owned()
        };
        if rest
            .split(['/', '?'])
            .next()
            .is_some_and(|authority| authority.contains('@'))
        {
            let remedy = "credentials in the URL are not sent: put them into OTEL_EXPORTER_OTLP_HEADERS, as authorization=…";
            return Err(wrong(self.setting, remedy));
        }
        let uri: Uri = format!("{scheme}://{rest}")
            .parse()
            .map_err(|e| self.no_url(&e))?;
        if uri.host().is_none_or(str::is_empty) {
            return Err(self.no_url(&"it names no host"));
        }
        // Without this a port that is no port would silently be the scheme's own.
        if has_port(&rest) && uri.port_u16().is_none() {
            return Err(self.no_url(&"its port is not a number from 1 to 65535"));
        }
        let no_path = matches!(uri.path(), "" | "/") && uri.query().is_none();
        let protocol = match wanted {
            _ if by_scheme => Protocol::Grpc,
            Some(wanted) => wanted,
            None if uri.port_u16() == Some(4317) && no_path => Protocol::Grpc,
            None => Protocol::HttpProtobuf,
        };
        match protocol {
            Protocol::Grpc if no_path => Ok((uri, protocol)),
            Protocol::Grpc => {
                let problem = format!(
                    "gRPC takes no path: use {scheme}://{}",
                    uri.authority().map_or("", |a| a.as_str())
                );
                Err(wrong(self.setting, problem))
            }
            Protocol::HttpProtobuf => Ok((self.traces_url(&uri)?, protocol)),
        }
    }

    /// `http` or `https`, what follows, and whether the scheme chose gRPC.
    fn scheme(
        &self,
        wanted: Option<Protocol>,
        env: &Environment<'_>,
    ) -> Result<(&'static str, &str, bool), ConfigError> {
        let Some((scheme, rest)) = self.url.split_once("://") else {
            // As specified for gRPC: encrypted unless told otherwise.
            if wanted == Some(Protocol::Grpc) {
                let insecure = env
                    .signal("INSECURE")?
                    .is_some_and(|(_, is)| is.eq_ignore_ascii_case("true"));
                return Ok((if insecure { "http" } else { "https" }, &self.url, false));
            }
            return Err(self.no_url(&"it does not begin with http://, https:// or grpc://"));
        };
        match scheme.to_ascii_lowercase().as_str() {
            "http" => Ok(("http", rest, false)),
            "https" => Ok(("https", rest, false)),
            "grpc" => Ok(("http", rest, true)),
            "grpcs" => Ok(("https", rest, true)),
            _ => Err(self.no_url(&"it does not begin with http://, https:// or grpc://")),
        }
    }

    fn traces_url(&self, uri: &Uri) -> Result<Uri, ConfigError> {
        let whole = match self.form {
            Form::Whole => true,
            Form::Base => false,
            Form::BaseOrWhole => uri.path().trim_end_matches('/').ends_with(TRACES_PATH),
        };
        if whole {
            return Ok(uri.clone());
        }
        if uri.query().is_some() {
            let remedy =
                "a base URL has no query: give the whole URL in OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
            return Err(wrong(self.setting, remedy));
        }
        let base = uri.to_string();
        let url = format!("{}{TRACES_PATH}", base.strip_suffix('/').unwrap_or(&base));
        url.parse().map_err(|e| self.no_url(&e))
    }

    fn no_url(&self, why: &dyn fmt::Display) -> ConfigError {
        let example = "for example http://localhost:4318, or grpc://localhost:4317";
        wrong(
            self.setting,
            format!("{:?} is not a collector's URL: {why} ({example})", self.url),
        )
    }
}

/// Whether the authority at the beginning of `rest` names a port; an IPv6 address stands in brackets.
fn has_port(rest: &str) -> bool {
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    authority
        .rsplit_once(':')
        .is_some_and(|(_, port)| !port.contains(']'))
}

fn with_port(rest: &str, port: u16) -> String {
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    format!("{}:{port}{}", &rest[..end], &rest[end..])
}
