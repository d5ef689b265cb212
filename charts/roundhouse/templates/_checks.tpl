{{/* Fails where a name, a label or a variable takes the place of one that the chart relies on. */}}
{{- define "roundhouse.checkNames" -}}
{{- $name := include "roundhouse.fullname" . }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) }}
{{- fail (printf "every object's name would begin with %q, and a Service's takes small letters, digits and hyphens, a letter first; set fullnameOverride to such a name" $name) }}
{{- end }}
{{- range $label, $_ := .Values.commonLabels }}
{{- if regexMatch "^(app\\.kubernetes\\.io/(name|instance|component|version|part-of|managed-by)|helm\\.sh/chart|roundhouse\\.dev/.*)$" $label }}
{{- fail (printf "commonLabels has %s, by which the chart finds its own objects; leave it out" $label) }}
{{- end }}
{{- end }}
{{- $seen := dict }}
{{- range .Values.extraEnv }}
{{- if not .name }}
{{- fail (printf "extraEnv has an entry without a name, %s; give it one" (toJson .)) }}
{{- end }}
{{- if hasKey $seen .name }}
{{- fail (printf "extraEnv has %s twice; leave one out" .name) }}
{{- end }}
{{- $_ := set $seen .name true }}
{{- if hasPrefix "RAY_gcs_storage" .name }}
{{- fail (printf "extraEnv has %s, by which the chart has the head keep its state on its volume; leave it out" .name) }}
{{- end }}
{{- if regexMatch "^RAY_AUTH_(MODE|TOKEN.*)$" .name }}
{{- fail (printf "extraEnv has %s, which the chart sets: without the token anybody in the cluster could run code; give the token by ray.token.existingSecret" .name) }}
{{- end }}
{{- end }}
{{- end }}

{{/* Fails where a kind of cache or of entrance lacks what it needs. */}}
{{- define "roundhouse.checkPlaces" -}}
{{- if and (eq .Values.ray.provider "kuberay") .Values.gcs.persistence.existingClaim (eq .Values.ray.kuberay.upgradeStrategy "NewCluster") }}
{{- fail "gcs.persistence.existingClaim would be written by two heads while KubeRay replaces a cluster; leave it empty, or set ray.kuberay.upgradeStrategy to None" }}
{{- end }}
{{- with .Values.gcs.persistence }}
{{- if and .existingClaim (not .enabled) }}
{{- fail (printf "gcs.persistence.existingClaim is %s and gcs.persistence.enabled is false; turn it on, or leave the claim out" .existingClaim) }}
{{- end }}
{{- end }}
{{- with .Values.podDisruptionBudget }}
{{- if and .enabled (not (.maxUnavailable | toString | trimSuffix "%" | int)) }}
{{- fail (printf "podDisruptionBudget.maxUnavailable is %v: no node with a worker could ever be drained; give it 1 or more, or turn podDisruptionBudget.enabled off" .maxUnavailable) }}
{{- end }}
{{- end }}
{{- $cache := .Values.cache }}
{{- if and (eq $cache.type "hostPath") (not $cache.hostPath) }}
{{- fail "cache.type is hostPath and cache.hostPath is empty; give it the folder on the nodes, such as /var/cache/roundhouse" }}
{{- end }}
{{- if and $cache.existingClaim (ne $cache.type "pvc") }}
{{- fail (printf "cache.existingClaim is %s and cache.type is %s; set cache.type to pvc" $cache.existingClaim $cache.type) }}
{{- end }}
{{- if and $cache.hostPath (ne $cache.type "hostPath") }}
{{- fail (printf "cache.hostPath is %s and cache.type is %s; set cache.type to hostPath" $cache.hostPath $cache.type) }}
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) }}
{{- fail "ingress.enabled is true and ingress.host is empty; give it the host that callers use" }}
{{- end }}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) }}
{{- fail "httpRoute.enabled is true and httpRoute.parentRefs is empty; name the Gateway that the route belongs to" }}
{{- end }}
{{- if and .Values.service.nodePort (eq .Values.service.type "ClusterIP") }}
{{- fail "service.nodePort is given and service.type is ClusterIP; set service.type to NodePort or LoadBalancer" }}
{{- end }}
{{- end }}

{{/* Fails where nobody could collect what is told. */}}
{{- define "roundhouse.checkMonitoring" -}}
{{- if .Values.monitoring.podMonitor.enabled }}
{{- if not .Values.monitoring.enabled }}
{{- fail "monitoring.podMonitor.enabled is true and monitoring.enabled is false, so Ray's pods tell nothing; set monitoring.enabled to true" }}
{{- end }}
{{- if and .Values.networkPolicy.enabled (not .Values.networkPolicy.metricsFrom) }}
{{- fail "monitoring.podMonitor.enabled is true and networkPolicy.metricsFrom is empty, so no Prometheus is let in; name its namespace there, or turn networkPolicy.enabled off" }}
{{- end }}
{{- end }}
{{- end }}

{{/* Fails where there are no workers, or a group's numbers contradict each other. */}}
{{- define "roundhouse.checkWorkers" -}}
{{- $workers := 0 }}
{{- range $name, $given := .Values.ray.workerGroups }}
{{- $group := include "roundhouse.worker" $given | fromYaml }}
{{- $most := int (default $group.replicas $group.maxReplicas) }}
{{- if lt $most (int $group.replicas) }}
{{- fail (printf "ray.workerGroups.%s: maxReplicas, %d, is below replicas, %d" $name $most (int $group.replicas)) }}
{{- end }}
{{- if and (gt $most (int $group.replicas)) (not $.Values.ray.kuberay.autoscaling.enabled) }}
{{- fail (printf "ray.workerGroups.%s: maxReplicas, %d, is above replicas, %d, and ray.kuberay.autoscaling.enabled is false; turn it on, or set replicas" $name $most (int $group.replicas)) }}
{{- end }}
{{- if and $group.maxReplicas (ne $.Values.ray.provider "kuberay") }}
{{- fail (printf "ray.workerGroups.%s: maxReplicas is for ray.provider kuberay, which adds workers by itself; set replicas" $name) }}
{{- end }}
{{- range $kind := list "requests" "limits" }}
{{- $asked := dig $kind $group.gpuResource $group.gpus $group.resources }}
{{- if ne (include "roundhouse.setting" $asked) (include "roundhouse.setting" $group.gpus) }}
{{- fail (printf "ray.workerGroups.%s: resources.%s has %v of %s and gpus, which Ray counts, is %v; leave it out there, or give both the same" $name $kind $asked $group.gpuResource $group.gpus) }}
{{- end }}
{{- end }}
{{- $workers = add $workers $most }}
{{- end }}
{{- if not $workers }}
{{- fail "ray.workerGroups has no worker; give a group replicas, since the head runs no model" }}
{{- end }}
{{- $cache := .Values.cache }}
{{- if and (eq $cache.type "pvc") (not $cache.existingClaim) (not (has "ReadWriteMany" $cache.accessModes)) (gt (int $workers) 1) }}
{{- fail (printf "cache.accessModes is %s and there are up to %d workers, on several nodes; give it ReadWriteMany, or take cache.type emptyDir" (join ", " $cache.accessModes) $workers) }}
{{- end }}
{{- if gt (int .Values.gateway.replicas) (int $workers) }}
{{- fail (printf "gateway.replicas is %d and there are %d workers at most, with one gateway each; leave it null for one on every worker" (int .Values.gateway.replicas) $workers) }}
{{- end }}
{{- end }}

{{/* Fails where a model contradicts itself, another, or every worker. */}}
{{- define "roundhouse.checkModels" -}}
{{- $seen := dict }}
{{- range .Values.models }}
{{- $place := printf "models: %s" .name }}
{{- if hasKey $seen .name }}
{{- fail (printf "%s is declared more than once" $place) }}
{{- end }}
{{- $_ := set $seen .name true }}
{{- if and (hasPrefix "file:" .source) (not (hasPrefix "file:/" .source)) }}
{{- fail (printf "%s: source %s is relative, and a cluster has no folder of the declaration; give a path in the image or on a mounted volume, such as file:/models/%s" $place .source .name) }}
{{- end }}
{{- $scaling := default dict .scaling }}
{{- $least := int (default 1 $scaling.min_replicas) }}
{{- $most := int (default 1 $scaling.max_replicas) }}
{{- if lt $most $least }}
{{- fail (printf "%s: scaling.max_replicas, %d, is below min_replicas, %d" $place $most $least) }}
{{- end }}
{{- $latency := dig "latency_ms" 0 (default dict .objectives) | float64 }}
{{- if gt $latency (default 60000 .deadline_ms | float64) }}
{{- fail (printf "%s: objectives.latency_ms, %v, is above deadline_ms, %v; no request waits that long for its answer" $place $latency (default 60000 .deadline_ms)) }}
{{- end }}
{{- $gpus := dig "gpus" 0 (default dict .resources) | float64 }}
{{- if and (eq (default "auto" .device) "cuda") (not $gpus) }}
{{- fail (printf "%s: device is cuda and resources.gpus is 0; give it 1 or a fraction" $place) }}
{{- end }}
{{- if and (eq (default "auto" .device) "cpu") $gpus }}
{{- fail (printf "%s: resources.gpus is %v and device is cpu; leave one of them out" $place $gpus) }}
{{- end }}
{{- if and (gt $gpus 1.0) (ne (floor $gpus) $gpus) }}
{{- fail (printf "%s: resources.gpus is %v, and an amount above 1 is whole; a replica takes a part of one GPU, or whole ones" $place $gpus) }}
{{- end }}
{{- include "roundhouse.checkSize" (dict "root" $ "place" $place "resources" (default dict .resources)) }}
{{- end }}
{{- end }}

{{/* Fails where no worker has room for one replica, beside a gateway where each worker has one. */}}
{{- define "roundhouse.checkSize" -}}
{{- $cpus := default 1 .resources.cpus }}
{{- $gpus := default 0 .resources.gpus }}
{{- $memory := include "roundhouse.bytes" (default 0 .resources.memory) | int64 }}
{{- $workers := include "roundhouse.workers" .root | int }}
{{- $kept := ternary 0.01 0.0 (ge (include "roundhouse.gatewayReplicas" .root | int) $workers) }}
{{- $sizes := list }}
{{- $fits := false }}
{{- $gpuGroup := false }}
{{- range $name, $given := .root.Values.ray.workerGroups }}
{{- $group := include "roundhouse.worker" $given | fromYaml }}
{{- $own := include "roundhouse.modelMemory" $group | int64 }}
{{- $sizes = append $sizes (printf "%s has %v CPUs, %v GPUs, %dMi beside Ray" $name $group.cpus $group.gpus (div $own 1048576)) }}
{{- $gpuGroup = or $gpuGroup (gt (float64 $group.gpus) 0.0) }}
{{- $room := and (le (addf $cpus $kept) (float64 $group.cpus)) (le (float64 $gpus) (float64 $group.gpus)) }}
{{- $fits = or $fits (and $room (le $memory $own)) }}
{{- end }}
{{- if and (gt (float64 $gpus) 0.0) (not $gpuGroup) }}
{{- fail (printf "%s: resources.gpus is %v and no group of ray.workerGroups has GPUs; give one gpus: %v" .place $gpus (ceil $gpus)) }}
{{- end }}
{{- if not $fits }}
{{- fail (printf "%s: one replica takes %v CPUs, %v GPUs, %v of memory, more than any worker has%s (%s)" .place $cpus $gpus (default "any amount" .resources.memory) (ternary " beside the gateway's 0.01 CPUs" "" (gt $kept 0.0)) (join "; " $sizes)) }}
{{- end }}
{{- end }}
