{{- define "headway.name" -}}
{{- if contains "headway" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-headway" (.Release.Name | trunc 32 | trimSuffix "-") -}}
{{- end -}}
{{- end -}}

{{- define "headway.selector" -}}
app.kubernetes.io/name: headway
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "headway.labels" -}}
{{ include "headway.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "headway.image" -}}
{{- $repository := required "image.repository: name the image, which deploy/docker makes" .Values.image.repository -}}
{{- printf "%s:%s" $repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}

{{- define "headway.claim" -}}
{{- default (printf "%s-weights" (include "headway.name" .)) .Values.weights.existingClaim -}}
{{- end -}}

{{/* Engines of one node. */}}
{{- define "headway.perNode" -}}
{{- if .Values.engine.perNode -}}
{{- .Values.engine.perNode -}}
{{- else if eq .Values.device "cpu" -}}
2
{{- else -}}
{{- div .Values.nodes.gpus .Values.engine.gpus -}}
{{- end -}}
{{- end -}}

{{/* What cannot work is said before anything is made of it. */}}
{{- define "headway.check" -}}
{{- $perNode := int (include "headway.perNode" .) -}}
{{- if and (eq .Values.device "cuda") (or (lt $perNode 1) (gt (mul $perNode (int .Values.engine.gpus)) (int .Values.nodes.gpus))) -}}
{{- fail (printf "engine.gpus: %d engines of %d GPUs do not fit nodes of %d (nodes.gpus)" $perNode (int .Values.engine.gpus) (int .Values.nodes.gpus)) -}}
{{- end -}}
{{- if and (eq .Values.device "cpu") (gt (int .Values.nodes.gpus) 0) -}}
{{- fail "nodes.gpus: must be 0 with device cpu" -}}
{{- end -}}
{{- if and .Values.autoscaler.enabled (gt (int .Values.autoscaler.minNodes) (int .Values.autoscaler.maxNodes)) -}}
{{- fail "autoscaler.minNodes: is more than autoscaler.maxNodes" -}}
{{- end -}}
{{- if and .Values.autoscaler.enabled (or (lt (int .Values.nodes.count) (int .Values.autoscaler.minNodes)) (gt (int .Values.nodes.count) (int .Values.autoscaler.maxNodes))) -}}
{{- fail "nodes.count: must be between autoscaler.minNodes and autoscaler.maxNodes" -}}
{{- end -}}
{{- $several := or (gt (int .Values.nodes.count) 1) (and .Values.autoscaler.enabled (gt (int .Values.autoscaler.maxNodes) 1)) -}}
{{- if and $several (not .Values.weights.existingClaim) (not (or (has "ReadWriteMany" .Values.weights.accessModes) (has "ReadOnlyMany" .Values.weights.accessModes))) -}}
{{- fail "weights.accessModes: several nodes need ReadWriteMany, or weights.existingClaim" -}}
{{- end -}}
{{- if and .Values.serviceMonitor.enabled (not .Values.serviceMonitor.tokenSecret) -}}
{{- fail "serviceMonitor.tokenSecret: metrics need an admin key" -}}
{{- end -}}
{{- end -}}

{{/* Headway's configuration: the user's, and over it what the chart answers for. */}}
{{- define "headway.args" -}}
{{- $secret := required "keys.secret: name the Secret with the API keys; without keys nothing listens on a network" .Values.keys.secret -}}
{{- $gateway := dict "front" "own" "host" "0.0.0.0" "port" 8000 "replicas" (mul .Values.gateway.perNode .Values.nodes.count) "metrics_port" (int .Values.gateway.metricsPort) -}}
{{- $args := deepCopy .Values.config -}}
{{- $args = mergeOverwrite $args (dict "model" .Values.model "device" .Values.device "replicas" (int (include "headway.perNode" .))) -}}
{{- $_ := set $args "tensor_parallel_size" (ternary 1 (int .Values.engine.gpus) (eq .Values.device "cpu")) -}}
{{/* TLS ends before the Service: the readiness probe speaks none. */}}
{{- $own := omit (default dict (get $args "gateway")) "tls_cert_file" "tls_key_file" -}}
{{- $_ := set $args "gateway" (mergeOverwrite $own $gateway) -}}
{{- $_ := set $args "auth" (mergeOverwrite (default dict (get $args "auth")) (dict "keys_file" "/etc/headway/keys/keys.json" "open_metrics" false)) -}}
{{- toYaml $args -}}
{{- end -}}

{{/* Ray Serve's config. Nodes with the label plan and run the engines: the head has no GPU. */}}
{{- define "headway.serveConfig" -}}
proxy_location: Disabled
applications:
  - name: headway
    route_prefix: /
    import_path: serving.cluster.application:build
    args:
      {{- include "headway.args" . | nindent 6 }}
    deployments:
      - name: Engine
        num_replicas: {{ mul (int (include "headway.perNode" .)) (int .Values.nodes.count) }}
        ray_actor_options:
          num_cpus: 1
          num_gpus: {{ ternary 0 (int .Values.engine.gpus) (eq .Values.device "cpu") }}
          label_selector:
            headway.engines: "true"
      - name: Gateway
        num_replicas: {{ mul .Values.gateway.perNode .Values.nodes.count }}
        max_replicas_per_node: {{ .Values.gateway.perNode }}
{{- end -}}

{{- define "headway.rayEnv" -}}
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: RAY_memory_monitor_refresh_ms
  value: "0"
- name: RAY_worker_oom_score_adjustment
  value: "0"
- name: RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS
  value: "1"
- name: RAY_kill_worker_timeout_milliseconds
  value: "1000"
- name: RAY_worker_niceness
  value: "0"
- name: HOME
  value: /home/headway
{{- end -}}

{{- define "headway.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "headway.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Of the Ray node itself: its raylet, and on the head the GCS. */}}
{{- define "headway.nodeProbes" -}}
startupProbe:
  httpGet:
    path: /api/healthz
    port: 52365
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 60
livenessProbe:
  httpGet:
    path: /api/healthz
    port: 52365
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
{{- end -}}
