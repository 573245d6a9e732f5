//! What form of answer a client accepts. JSON is the only encoding; the table form is what kubectl
//! prints, the aggregated form is one discovery answer instead of one a group.

use crate::resource::ApiError;
use crate::resource::discovery::Aggregated;
use crate::resource::types::protobuf;

/// The form of an object or list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Plain,
    Table,
}

/// Picks the first form in an `Accept` header that can be served. 406 when there is none.
pub(super) fn form(accept: Option<&str>) -> Result<Form, ApiError> {
    let Some(accept) = accept.filter(|a| !a.trim().is_empty()) else { return Ok(Form::Plain) };
    for option in accept.split(',') {
        let (media, params) = media(option);
        if !is_json(media) {
            continue;
        }
        match params.iter().find(|(k, _)| *k == "as").map(|(_, v)| *v) {
            None => return Ok(Form::Plain),
            Some("Table") if is(&params, "g", "meta.k8s.io") && is_known(&params) => return Ok(Form::Table),
            Some(_) => {}
        }
    }
    Err(ApiError::not_acceptable(&["application/json", "application/json;as=Table;v=v1;g=meta.k8s.io"]))
}

/// The aggregated discovery form that is asked for, if any.
pub(super) fn aggregated(accept: Option<&str>) -> Option<Aggregated> {
    accept?.split(',').find_map(|option| {
        let (media, params) = media(option);
        if !is_json(media) || !is(&params, "as", "APIGroupDiscoveryList") {
            return None;
        }
        match params.iter().find(|(k, _)| *k == "v").map(|(_, v)| *v) {
            Some("v2") => Some(Aggregated::V2),
            Some("v2beta1") => Some(Aggregated::V2Beta1),
            _ => None,
        }
    })
}

fn media(option: &str) -> (&str, Vec<(&str, &str)>) {
    let mut parts = option.split(';').map(str::trim);
    let media = parts.next().unwrap_or("");
    (media, parts.filter_map(|p| p.split_once('=')).collect())
}

fn is_json(media: &str) -> bool {
    matches!(media, "application/json" | "application/*" | "*/*")
}

fn is(params: &[(&str, &str)], key: &str, value: &str) -> bool {
    params.iter().any(|(k, v)| *k == key && *v == value)
}

fn is_known(params: &[(&str, &str)]) -> bool {
    is(params, "v", "v1") || is(params, "v", "v1beta1")
}

/// How a body is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BodyForm {
    Json,
    Protobuf,
}

/// Reads the `Content-Type` of an object. 415 for what can't be read.
pub(super) fn body_form(content_type: Option<&str>) -> Result<BodyForm, ApiError> {
    let media = content_type.unwrap_or("").split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    match media.as_str() {
        "" | "application/json" => Ok(BodyForm::Json),
        protobuf::MEDIA_TYPE => Ok(BodyForm::Protobuf),
        _ => Err(ApiError::unsupported_media_type(&media, &["application/json", protobuf::MEDIA_TYPE])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubectl_gets_tables_and_clients_json() {
        let kubectl = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(form(Some(kubectl)).unwrap(), Form::Table);
        assert_eq!(form(Some("application/vnd.kubernetes.protobuf,application/json")).unwrap(), Form::Plain);
        assert_eq!(form(Some("application/vnd.kubernetes.protobuf, */*")).unwrap(), Form::Plain);
        assert_eq!(
            form(Some("application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io,application/json"))
                .unwrap(),
            Form::Plain
        );
        assert_eq!(form(None).unwrap(), Form::Plain);
        assert_eq!(form(Some("application/vnd.kubernetes.protobuf")).unwrap_err().code, 406);
        assert_eq!(form(Some("text/html")).unwrap_err().code, 406);
    }

    #[test]
    fn both_generations_of_aggregated_discovery() {
        let new = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList,application/json";
        assert_eq!(aggregated(Some(new)), Some(Aggregated::V2));
        let old =
            "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList,application/json";
        assert_eq!(aggregated(Some(old)), Some(Aggregated::V2Beta1));
        assert_eq!(aggregated(Some("application/json")), None);
    }

    #[test]
    fn bodies() {
        assert_eq!(body_form(None).unwrap(), BodyForm::Json);
        assert_eq!(body_form(Some("application/json; charset=utf-8")).unwrap(), BodyForm::Json);
        assert_eq!(body_form(Some("application/vnd.kubernetes.protobuf")).unwrap(), BodyForm::Protobuf);
        assert_eq!(body_form(Some("application/cbor")).unwrap_err().code, 415);
    }
}
