{{/* What a worker's container asks for. Its GPUs are always those that Ray counts. Takes a group of workers. */}}
{{- define "roundhouse.workerResources" -}}
{{- $made := dict "requests" (dict "cpu" (toString .cpus) "memory" .memory) "limits" (dict "memory" .memory) }}
{{- $resources := deepCopy (default $made .resources) }}
{{- if .gpus }}
{{- $_ := set $resources "limits" (merge (default dict $resources.limits) (dict .gpuResource (toString .gpus))) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{- define "roundhouse.cacheVolume" -}}
{{- if eq .Values.cache.type "pvc" }}
persistentVolumeClaim:
  claimName: {{ default (printf "%s-cache" (include "roundhouse.fullname" .)) .Values.cache.existingClaim }}
{{- else if eq .Values.cache.type "hostPath" }}
# A folder that the kubelet made would belong to root, and no worker could write there.
hostPath:
  path: {{ .Values.cache.hostPath }}
  type: Directory
{{- else }}
emptyDir: {}
{{- end }}
{{- end }}

{{/* The pod of a worker, of either provider. Takes (dict "root" "worker"). */}}
{{- define "roundhouse.workerPod" -}}
{{- $root := .root -}}
{{- $worker := .worker -}}
{{- $head := printf "%s-head:6379" (include "roundhouse.fullname" .root) -}}
{{- if eq .root.Values.ray.provider "kuberay" }}
{{- $head = `"$FQ_RAY_IP:6379"` }}
{{- end -}}
serviceAccountName: {{ include "roundhouse.fullname" $root }}-ray
automountServiceAccountToken: false
{{- include "roundhouse.podSecurity" $root | nindent 0 }}
{{- include "roundhouse.placement" $worker | nindent 0 }}
{{- with $worker.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
topologySpreadConstraints:
  {{- if $worker.topologySpreadConstraints }}
  {{- toYaml $worker.topologySpreadConstraints | nindent 2 }}
  {{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "roundhouse.selector" (list $root "worker") | nindent 8 }}
  {{- end }}
terminationGracePeriodSeconds: {{ add $root.Values.ray.drainSeconds 30 }}
containers:
  - name: ray
    image: {{ include "roundhouse.image" $root }}
    imagePullPolicy: {{ $root.Values.image.pullPolicy }}
    {{- include "roundhouse.containerSecurity" $root | nindent 4 }}
    command: [/bin/sh, -c]
    args:
      - |
        {{- include "roundhouse.rayStart" (dict "root" $root "node" (printf "--address=%s" $head) "params" (include "roundhouse.workerParams" $worker)) | nindent 8 }}
    env:
      {{- include "roundhouse.rayEnv" $root | nindent 6 }}
    {{- with $root.Values.extraEnvFrom }}
    envFrom:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    ports:
      - {name: serve, containerPort: 8000}
      - {name: raylet, containerPort: 6380}
      {{- if $root.Values.monitoring.enabled }}
      - {name: node-metrics, containerPort: {{ include "roundhouse.nodeMetricsPort" $root }}}
      {{- end }}
    lifecycle:
      preStop:
        exec:
          command:
            - /bin/sh
            - -c
            - |
              # What it says goes to the pod's log where that can be written to; Kubernetes would drop it.
              if (: >/proc/1/fd/1) 2>/dev/null; then exec >/proc/1/fd/1 2>&1; fi
              exec roundhouse drain-node --head {{ $head }} --node-ip "$POD_IP" --deadline-s {{ $root.Values.ray.drainSeconds }}
    # The raylet's port opens when the worker has joined; traffic comes once a proxy runs here, beside a replica.
    startupProbe:
      tcpSocket: {port: raylet}
      periodSeconds: 2
      failureThreshold: 300
    readinessProbe:
      httpGet: {path: /-/healthz, port: serve}
      periodSeconds: 2
      failureThreshold: 2
    livenessProbe:
      tcpSocket: {port: raylet}
      periodSeconds: 10
      failureThreshold: 6
    resources:
      {{- include "roundhouse.workerResources" $worker | nindent 6 }}
    volumeMounts:
      {{- include "roundhouse.rayMounts" $root | nindent 6 }}
      - {name: cache, mountPath: /var/cache/roundhouse}
volumes:
  {{- include "roundhouse.rayVolumes" $root | nindent 2 }}
  - name: cache
    {{- include "roundhouse.cacheVolume" $root | nindent 4 }}
{{- end }}
