//! An external scaler for KEDA (`externalscaler.ExternalScaler`): scales a service by its load.
//!
//! The metric is the sum, or the mean, of the loads of the instances on this node. KEDA divides it by the target load per
//! instance. If the load is unknown the call fails instead of reporting a number: KEDA then keeps the current scale, or uses
//! the fallback of the ScaledObject.

use std::{collections::HashMap, sync::Arc, time::Duration};

use http::{Request, Response};
use hyper::body::Incoming;
use tokio_stream::{StreamExt as _, wrappers::IntervalStream};
use tonic::{Status, body::Body, server::Grpc};
use tonic_prost::ProstCodec;

use super::{Shared, adapter_stats::AdapterStats, clock, grpc, listen::Endpoint};

const SERVICE: &str = "/externalscaler.ExternalScaler/";
const METRIC: &str = "tailback_load";
/// Default of `targetLoad`, the load per instance to aim for: leaves 20% of headroom.
const DEFAULT_TARGET_LOAD: f64 = 0.8;
/// How often a stream checks for a change.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Clone, PartialEq, prost::Message)]
struct ScaledObjectRef {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    namespace: String,
    #[prost(map = "string, string", tag = "3")]
    scaler_metadata: HashMap<String, String>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct IsActiveResponse {
    #[prost(bool, tag = "1")]
    result: bool,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GetMetricSpecResponse {
    #[prost(message, repeated, tag = "1")]
    metric_specs: Vec<MetricSpec>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct MetricSpec {
    #[prost(string, tag = "1")]
    metric_name: String,
    /// For KEDA versions without `double` metrics.
    #[prost(int64, tag = "2")]
    target_size: i64,
    #[prost(double, tag = "3")]
    target_size_float: f64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GetMetricsRequest {
    #[prost(message, optional, tag = "1")]
    scaled_object_ref: Option<ScaledObjectRef>,
    #[prost(string, tag = "2")]
    metric_name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GetMetricsResponse {
    #[prost(message, repeated, tag = "1")]
    metric_values: Vec<MetricValue>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct MetricValue {
    #[prost(string, tag = "1")]
    metric_name: String,
    /// For KEDA versions without `double` metrics.
    #[prost(int64, tag = "2")]
    metric_value: i64,
    #[prost(double, tag = "3")]
    metric_value_float: f64,
}

/// The metadata of a ScaledObject's trigger.
#[derive(Debug, PartialEq)]
struct Trigger {
    target: String,
    target_load: f64,
    /// The mean of the loads (for `metricType: Value`, which assumes that instances on other nodes are alike) instead of their
    /// sum (for `AverageValue`).
    is_mean: bool,
    /// The service is active above this load; without it, while an instance runs.
    activation_load: Option<f64>,
}

impl Trigger {
    fn parse(object: &ScaledObjectRef) -> Result<Self, Status> {
        let metadata = &object.scaler_metadata;
        let number = |key: &str| match metadata.get(key) {
            None => Ok(None),
            Some(text) => match text.parse::<f64>() {
                Ok(number) if number > 0.0 && number.is_finite() => Ok(Some(number)),
                _ => Err(Status::invalid_argument(format!(
                    "{key}: {text:?} is not a number greater than 0, such as \"0.8\""
                ))),
            },
        };
        let target = metadata.get("target").filter(|target| !target.is_empty());
        let target = target.ok_or_else(|| {
            Status::invalid_argument(
                "no target in the trigger's metadata: set it to the service's name as shown by `tailback status`",
            )
        })?;
        Ok(Self {
            target: target.clone(),
            is_mean: match metadata.get("metric").map_or("sum", String::as_str) {
                "sum" => false,
                "mean" => true,
                other => {
                    return Err(Status::invalid_argument(format!(
                        "metric: {other:?} is neither \"sum\" (of all instances on this node; metricType AverageValue) nor \"mean\" (metricType Value)"
                    )));
                }
            },
            target_load: number("targetLoad")?.unwrap_or(DEFAULT_TARGET_LOAD),
            activation_load: number("activationLoad")?,
        })
    }

    /// The load of the instances on this node.
    fn load(&self, shared: &Shared) -> Result<f64, Status> {
        let loads: Vec<f64> = shared
            .pages
            .instances(&self.target)
            .into_iter()
            .filter(|(_, pressure)| pressure.pid != 0)
            .map(|(_, pressure)| pressure.load)
            .collect();
        if loads.is_empty() {
            return Err(Status::unavailable(format!(
                "no data for {:?} on this node: the service is not watched, or the agent is not running",
                self.target
            )));
        }
        let sum: f64 = loads.iter().sum();
        Ok(if self.is_mean {
            sum / loads.len() as f64
        } else {
            sum
        })
    }

    fn is_active(&self, shared: &Shared) -> Result<IsActiveResponse, Status> {
        let load = self.load(shared)?;
        let result = self
            .activation_load
            .is_none_or(|threshold| load > threshold);
        Ok(IsActiveResponse { result })
    }

    fn spec(&self) -> GetMetricSpecResponse {
        let spec = MetricSpec {
            metric_name: METRIC.to_owned(),
            target_size: self.target_load.ceil() as i64,
            target_size_float: self.target_load,
        };
        GetMetricSpecResponse {
            metric_specs: vec![spec],
        }
    }
}

fn metrics(load: f64) -> GetMetricsResponse {
    let value = MetricValue {
        metric_name: METRIC.to_owned(),
        metric_value: load.ceil() as i64,
        metric_value_float: load,
    };
    GetMetricsResponse {
        metric_values: vec![value],
    }
}

/// Serves until dropped.
pub async fn serve(endpoint: Endpoint, shared: Arc<Shared>) {
    let stats = endpoint.stats();
    grpc::serve(endpoint, move |request| {
        answer(request, Arc::clone(&shared), Arc::clone(&stats))
    })
    .await;
}

async fn answer(
    request: Request<Incoming>,
    shared: Arc<Shared>,
    stats: Arc<AdapterStats>,
) -> Response<Body> {
    let path = request.uri().path().to_owned();
    match path.strip_prefix(SERVICE) {
        Some("IsActive") => {
            unary(request, stats, move |object: &ScaledObjectRef| {
                let active = Trigger::parse(object)?.is_active(&shared)?;
                Ok((format!("active: {}", active.result), active))
            })
            .await
        }
        Some("GetMetricSpec") => {
            unary(request, stats, |object: &ScaledObjectRef| {
                let trigger = Trigger::parse(object)?;
                Ok((
                    format!("target load {}", trigger.target_load),
                    trigger.spec(),
                ))
            })
            .await
        }
        Some("GetMetrics") => {
            unary(request, stats, move |asked: &GetMetricsRequest| {
                let object = asked.scaled_object_ref.clone().unwrap_or_default();
                let load = Trigger::parse(&object)?.load(&shared)?;
                Ok((format!("load {load:.2}"), metrics(load)))
            })
            .await
        }
        Some("StreamIsActive") => stream_is_active(request, shared, stats).await,
        _ => grpc::no_such_method(&path),
    }
}

/// Handles a unary call. `answer` also returns a summary for the statistics.
async fn unary<Q, A>(
    request: Request<Incoming>,
    stats: Arc<AdapterStats>,
    answer: impl Fn(&Q) -> Result<(String, A), Status>,
) -> Response<Body>
where
    Q: prost::Message + Default + Send + 'static,
    A: prost::Message + Send + 'static,
{
    let service = tower::service_fn(|request: tonic::Request<Q>| {
        let answer = answer(request.get_ref());
        stats.replied(match &answer {
            Ok((summary, _)) => summary,
            Err(status) => status.message(),
        });
        std::future::ready(answer.map(|(_, answer)| tonic::Response::new(answer)))
    });
    Grpc::new(ProstCodec::<A, Q>::default())
        .apply_max_message_size_config(Some(grpc::MAX_MESSAGE), None)
        .unary(service, request)
        .await
}

/// Sends the state at once and whenever it changes; nothing while it is unknown.
async fn stream_is_active(
    request: Request<Incoming>,
    shared: Arc<Shared>,
    stats: Arc<AdapterStats>,
) -> Response<Body> {
    let service = tower::service_fn(|request: tonic::Request<ScaledObjectRef>| {
        let (shared, stats) = (Arc::clone(&shared), Arc::clone(&stats));
        let answer = Trigger::parse(request.get_ref()).map(|trigger| {
            let mut last = None;
            let changes = IntervalStream::new(clock(CHECK_INTERVAL)).filter_map(move |_| {
                let now = trigger.is_active(&shared).ok()?;
                if last.replace(now.result) == Some(now.result) {
                    return None;
                }
                stats.replied(&format!("active: {}", now.result));
                Some(Ok::<_, Status>(now))
            });
            tonic::Response::new(changes)
        });
        std::future::ready(answer)
    });
    Grpc::new(ProstCodec::<IsActiveResponse, ScaledObjectRef>::default())
        .apply_max_message_size_config(Some(grpc::MAX_MESSAGE), None)
        .server_streaming(service, request)
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(metadata: &[(&str, &str)]) -> ScaledObjectRef {
        let pairs = metadata
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        ScaledObjectRef {
            scaler_metadata: pairs.collect(),
            ..ScaledObjectRef::default()
        }
    }

    #[test]
    fn the_metadata_of_a_scaled_object_is_validated() {
        let trigger =
            Trigger::parse(&object(&[("target", "shop"), ("targetLoad", "0.5")])).unwrap();
        assert_eq!(trigger.target_load, 0.5);
        assert_eq!(trigger.spec().metric_specs[0].target_size, 1, "an old KEDA");
        let trigger = Trigger::parse(&object(&[("target", "shop")])).unwrap();
        assert_eq!((trigger.target_load, trigger.activation_load), (0.8, None));
        for (metadata, words) in [
            (object(&[]), "no target"),
            (object(&[("target", "")]), "no target"),
            (
                object(&[("target", "a"), ("targetLoad", "much")]),
                "\"much\"",
            ),
            (
                object(&[("target", "a"), ("metric", "max")]),
                "neither \"sum\"",
            ),
            (
                object(&[("target", "a"), ("activationLoad", "-1")]),
                "\"-1\"",
            ),
        ] {
            let status = Trigger::parse(&metadata).unwrap_err();
            assert_eq!(status.code(), tonic::Code::InvalidArgument);
            assert!(status.message().contains(words), "{status:?}");
        }
    }
}
