{{/* Name of the chart, for labels. */}}
{{- define "roundhouse.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Beginning of the name of every object. */}}
{{- define "roundhouse.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains .Chart.Name .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "roundhouse.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Labels that select: they never change within a release. Takes (list root component). */}}
{{- define "roundhouse.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "roundhouse.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
{{- with index . 1 }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{/* All labels of an object. Takes (list root component). */}}
{{- define "roundhouse.labels" -}}
{{- $root := index . 0 -}}
{{ include "roundhouse.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: roundhouse
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Metadata of an object. Takes (list root suffix component). */}}
{{- define "roundhouse.metadata" -}}
{{- $root := index . 0 -}}
name: {{ include "roundhouse.fullname" $root }}{{ with index . 1 }}-{{ . }}{{ end }}
namespace: {{ $root.Release.Namespace }}
labels:
  {{- include "roundhouse.labels" (list $root (index . 2)) | nindent 2 }}
{{- with $root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Labels of what Prometheus or Grafana find by labels of the site's own. Takes (list root labels). */}}
{{- define "roundhouse.monitoringLabels" -}}
{{- $own := include "roundhouse.labels" (list (index . 0) "monitoring") | fromYaml }}
{{- toYaml (merge (dict) (index . 1) $own) }}
{{- end }}

{{- define "roundhouse.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ default .Chart.AppVersion $image.tag }}
{{- end }}
{{- end }}

{{/*
Name of the Lease. It is the namespace's, not the release's: Helm refuses a second release there, whose controller would
fight over the same Models.
*/}}
{{- define "roundhouse.lease" -}}
roundhouse-controller
{{- end }}

{{- define "roundhouse.tokenSecret" -}}
{{- default (printf "%s-ray-token" (include "roundhouse.fullname" .)) .Values.ray.token.existingSecret }}
{{- end }}

{{/* What Pod Security "restricted" asks of a pod. */}}
{{- define "roundhouse.podSecurity" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* What Pod Security "restricted" asks of a container, and a root file system that nobody writes to. */}}
{{- define "roundhouse.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{/* How our processes log. */}}
{{- define "roundhouse.logEnv" -}}
- name: ROUNDHOUSE_LOG_FORMAT
  value: {{ .Values.logs.format }}
- name: ROUNDHOUSE_ACCESS_LOG
  value: {{ .Values.logs.access | quote }}
{{- end }}

{{/* Variables of every pod of the Ray cluster: the chart's, but for those that extraEnv has another value for. */}}
{{- define "roundhouse.rayEnv" -}}
{{- $given := list }}
{{- range .Values.extraEnv }}
{{- $given = append $given .name }}
{{- end }}
{{- $variables := list }}
{{- range include "roundhouse.ownRayEnv" . | fromYamlArray }}
{{- if not (has .name $given) }}
{{- $variables = append $variables . }}
{{- end }}
{{- end }}
{{- toYaml (concat $variables (default list .Values.extraEnv)) }}
{{- end }}

{{- define "roundhouse.ownRayEnv" -}}
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
{{ .Files.Get "files/ray-environment.yaml" }}
{{ include "roundhouse.logEnv" . }}
- name: ROUNDHOUSE_PROXIES_URL
  value: {{ include "roundhouse.inferenceUrl" . }}
# A pod is a node; the folder outlives its containers, and with it what was counted.
- name: ROUNDHOUSE_METRICS_DIR
  value: /dev/shm/roundhouse-metrics
- name: RAY_AUTH_TOKEN_PATH
  value: /etc/roundhouse/token/auth_token
- name: RAY_gcs_rpc_server_reconnect_timeout_s
  value: "600"
{{- range $name, $value := .Values.settings }}
- name: ROUNDHOUSE_{{ upper (snakecase $name) }}
  value: {{ include "roundhouse.setting" $value | quote }}
{{- end }}
{{- end }}

{{/* A setting as a variable's text: lists with commas, and whole numbers without the exponent that Helm gives them. */}}
{{- define "roundhouse.setting" -}}
{{- if kindIs "slice" . }}
{{- join "," . }}
{{- else if and (kindIs "float64" .) (eq (floor .) .) }}
{{- int64 . }}
{{- else }}
{{- . }}
{{- end }}
{{- end }}

{{/* Mounts of every pod of the Ray cluster. */}}
{{- define "roundhouse.rayMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: shm, mountPath: /dev/shm}
- {name: token, mountPath: /etc/roundhouse/token, readOnly: true}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "roundhouse.rayVolumes" -}}
- name: tmp
  emptyDir: {}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: 512Mi
- name: token
  secret:
    secretName: {{ include "roundhouse.tokenSecret" . }}
    items:
      - {key: auth_token, path: auth_token}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Parameters of `ray start` on every node. Ports are fixed, so that probes and policies can name them. */}}
{{- define "roundhouse.nodeParams" -}}
node-ip-address: $POD_IP
object-store-memory: "83886080"
node-manager-port: "6380"
object-manager-port: "6381"
runtime-env-agent-port: "6382"
dashboard-agent-grpc-port: "6383"
dashboard-agent-listen-port: "6384"
metrics-export-port: "6385"
min-worker-port: "10002"
max-worker-port: "19999"
{{- end }}

{{- define "roundhouse.headParams" -}}
{{ include "roundhouse.nodeParams" . }}
port: "6379"
dashboard-host: 0.0.0.0
dashboard-port: "8265"
ray-client-server-port: "10001"
num-cpus: "0"
num-gpus: "0"
{{- end }}

{{/*
Bytes of a worker's memory that models may take: its limit, less the object store and 512 MiB for Ray's own processes, as
in serve/cluster/plan.py. Without it Ray would count what is free when it starts. Takes a group of workers.
*/}}
{{- define "roundhouse.modelMemory" -}}
{{- $limit := dig "limits" "memory" .memory .resources | toString }}
{{- $store := index (include "roundhouse.nodeParams" . | fromYaml) "object-store-memory" | int64 }}
{{- sub (sub (include "roundhouse.bytes" $limit | int64) $store) 536870912 | max 0 }}
{{- end }}

{{/* Takes a group of workers. */}}
{{- define "roundhouse.workerParams" -}}
{{ include "roundhouse.nodeParams" . }}
memory: {{ include "roundhouse.modelMemory" . | quote }}
num-cpus: {{ .cpus | quote }}
num-gpus: {{ .gpus | quote }}
{{- with .acceleratorType }}
resources: {{ printf `'{"accelerator_type:%s": 1}'` . | quote }}
{{- end }}
{{- end }}

{{/*
The shell's words that run Ray until a signal ends it. Takes (dict "root" "node" "params"). KubeRay adds to the parameters
and hands over the whole command.
*/}}
{{- define "roundhouse.rayStart" -}}
# The first process of a container ignores a signal that it does not handle, and Ray's handles none. It ends at once, and
# the others are killed with it: a Ray that ends in order tells its store that what ran there meant to go, and the Serve
# controller of a head would never be started again.
trap 'exit 0' TERM INT
roundhouse follow-logs &
{{- if .root.Values.monitoring.enabled }}
roundhouse metrics --port {{ include "roundhouse.nodeMetricsPort" .root }} &
{{- end }}
{{ if eq .root.Values.ray.provider "kuberay" -}}
eval "exec $KUBERAY_GEN_RAY_START_CMD" &
{{- else -}}
ray start {{ .node }}{{ range $key, $value := fromYaml .params }} --{{ $key }}={{ $value }}{{ end }} --disable-usage-stats --block &
{{- end }}
wait $!
{{- end }}

{{/* Port at which each node tells its own metrics. Port 8000 may lead to another node's. */}}
{{- define "roundhouse.nodeMetricsPort" -}}
6386
{{- end }}

{{/* Where a pod of the cluster sends requests to models. */}}
{{- define "roundhouse.inferenceUrl" -}}
http://{{ include "roundhouse.fullname" . }}-inference.{{ .Release.Namespace }}.svc:{{ .Values.service.port }}
{{- end }}

{{/* What callers should be told. */}}
{{- define "roundhouse.publicUrl" -}}
{{- if .Values.publicUrl -}}
{{ trimSuffix "/" .Values.publicUrl }}
{{- else if and .Values.ingress.enabled .Values.ingress.host -}}
http{{ if .Values.ingress.tlsSecretName }}s{{ end }}://{{ .Values.ingress.host }}
{{- else -}}
{{ include "roundhouse.inferenceUrl" . }}
{{- end }}
{{- end }}

{{/* Where pods are put. Takes a component's values. */}}
{{- define "roundhouse.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{/* How many workers there are at least. */}}
{{- define "roundhouse.workers" -}}
{{- $workers := 0 }}
{{- range .Values.ray.workerGroups }}
{{- $workers = add $workers (include "roundhouse.worker" . | fromYaml).replicas }}
{{- end }}
{{- $workers }}
{{- end }}

{{/* How many gateway replicas there are: by default one a worker, which makes every worker a way in. Ray takes no 0. */}}
{{- define "roundhouse.gatewayReplicas" -}}
{{- default (include "roundhouse.workers" . | int | max 1) .Values.gateway.replicas }}
{{- end }}

{{/* A group of workers with what it leaves out. Sprig's merge would take a 0 that is given for left out. */}}
{{- define "roundhouse.worker" -}}
{{- $worker := dict "replicas" 1 "cpus" 4 "memory" "8Gi" "gpus" 0 "gpuResource" "nvidia.com/gpu" "resources" dict }}
{{- range $key, $value := . }}
{{- if not (kindIs "invalid" $value) }}
{{- $_ := set $worker $key $value }}
{{- end }}
{{- end }}
{{- toYaml $worker }}
{{- end }}

{{/* How many workers stay of a group when as many as may leave. Takes (dict "workers" "leaving"), a count or a percentage. */}}
{{- define "roundhouse.staying" -}}
{{- $leaving := .leaving }}
{{- if kindIs "string" $leaving }}
{{- $leaving = div (mul .workers (trimSuffix "%" $leaving | int)) 100 | max 1 }}
{{- end }}
{{- max 0 (sub (int .workers) (int $leaving)) }}
{{- end }}

{{/* A mapping without nulls, which a Model cannot hold; a class's arguments keep theirs. */}}
{{- define "roundhouse.given" -}}
{{- $given := dict }}
{{- range $key, $value := . }}
{{- if and (kindIs "map" $value) (ne $key "arguments") }}
{{- $_ := set $given $key (include "roundhouse.given" $value | fromJson) }}
{{- else if not (kindIs "invalid" $value) }}
{{- $_ := set $given $key $value }}
{{- end }}
{{- end }}
{{- toJson $given }}
{{- end }}

{{/* Bytes of a quantity such as 512Mi or a whole number. */}}
{{- define "roundhouse.bytes" -}}
{{- $text := include "roundhouse.setting" . }}
{{- $suffix := regexFind "[A-Za-z]+$" $text }}
{{- $powers := dict "" 0 "k" 1 "K" 1 "M" 2 "G" 3 "T" 4 "P" 5 }}
{{- $bytes := trimSuffix $suffix $text | float64 }}
{{- range until (get $powers (trimSuffix "i" $suffix)) }}
{{- $bytes = mulf $bytes (ternary 1024 1000 (hasSuffix "i" $suffix)) }}
{{- end }}
{{- int64 $bytes }}
{{- end }}
