{{- define "tailback.name" -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "tailback.selector" -}}
app.kubernetes.io/name: tailback
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "tailback.labels" -}}
{{ include "tailback.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end -}}
