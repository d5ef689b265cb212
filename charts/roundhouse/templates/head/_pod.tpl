{{/* The pod of Ray's head, of either provider. */}}
{{- define "roundhouse.headPod" -}}
{{- $kuberay := eq .Values.ray.provider "kuberay" -}}
{{- if and $kuberay .Values.ray.kuberay.autoscaling.enabled }}
# The autoscaler beside the head calls the API, by an account that KubeRay makes.
automountServiceAccountToken: true
{{- else }}
serviceAccountName: {{ include "roundhouse.fullname" . }}-ray
automountServiceAccountToken: false
{{- end }}
{{- include "roundhouse.podSecurity" . | nindent 0 }}
{{- include "roundhouse.placement" .Values.ray.head | nindent 0 }}
terminationGracePeriodSeconds: 30
containers:
  - name: ray
    image: {{ include "roundhouse.image" . }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    {{- include "roundhouse.containerSecurity" . | nindent 4 }}
    command: [/bin/sh, -c]
    args:
      - |
        {{- include "roundhouse.rayStart" (dict "root" . "node" "--head" "params" (include "roundhouse.headParams" .)) | nindent 8 }}
    env:
      {{- include "roundhouse.rayEnv" . | nindent 6 }}
      {{- if not $kuberay }}
      - name: RAY_gcs_storage
        value: rocksdb
      - name: RAY_gcs_storage_path
        value: /var/lib/roundhouse/gcs
      {{- end }}
    {{- with .Values.extraEnvFrom }}
    envFrom:
      {{- toYaml . | nindent 6 }}
    {{- end }}
    ports:
      - {name: gcs, containerPort: 6379}
      - {name: dashboard, containerPort: 8265}
      - {name: serve, containerPort: 8000}
      {{- if .Values.monitoring.enabled }}
      - {name: node-metrics, containerPort: {{ include "roundhouse.nodeMetricsPort" . }}}
      {{- end }}
    # Ray's head takes up to a minute to answer; after that, a port that is closed is a process that is gone.
    startupProbe:
      tcpSocket: {port: dashboard}
      periodSeconds: 2
      failureThreshold: 150
    readinessProbe:
      tcpSocket: {port: dashboard}
      periodSeconds: 5
    livenessProbe:
      tcpSocket: {port: gcs}
      periodSeconds: 10
      failureThreshold: 6
    resources:
      {{- toYaml .Values.ray.head.resources | nindent 6 }}
    volumeMounts:
      {{- include "roundhouse.rayMounts" . | nindent 6 }}
      {{- if not $kuberay }}
      - {name: gcs, mountPath: /var/lib/roundhouse}
      {{- end }}
volumes:
  {{- include "roundhouse.rayVolumes" . | nindent 2 }}
  {{- if not $kuberay }}
  - name: gcs
    {{- if .Values.gcs.persistence.enabled }}
    persistentVolumeClaim:
      claimName: {{ default (printf "%s-gcs" (include "roundhouse.fullname" .)) .Values.gcs.persistence.existingClaim }}
    {{- else }}
    emptyDir: {}
    {{- end }}
  {{- end }}
{{- end }}
