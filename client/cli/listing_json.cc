#include "client/cli/listing_json.h"

#include <nlohmann/json.hpp>

namespace kvbroker::cli {
namespace {

using Json = nlohmann::ordered_json;

Json InstanceJson(const v1::InstanceStatus& instance,
                  const std::string& device_uuid) {
  Json labels = Json::object();
  for (const auto& [key, value] : instance.labels()) labels[key] = value;
  Json pids = Json::array();
  for (uint32_t pid : instance.pids()) pids.push_back(pid);
  return {
      {"ipc", instance.name()},
      {"limit_bytes", instance.max_bytes()},
      {"used_bytes", instance.in_use_bytes()},
      {"effective_limit_bytes", instance.effective_limit_bytes()},
      {"min_bytes", instance.min_bytes()},
      {"weight", instance.weight()},
      {"share_bytes", instance.share_bytes()},
      {"held_bytes", instance.held_bytes()},
      {"idle_bytes", instance.idle_bytes()},
      {"cached_bytes", instance.cached_bytes()},
      {"waiting_bytes", instance.waiting_bytes()},
      {"gpu", device_uuid},
      {"pids", std::move(pids)},
      {"tenant", instance.tenant()},
      {"pressure", instance.pressure()},
      {"labels", std::move(labels)},
      {"counters",
       {{"grants", instance.grants()},
        {"refusals", instance.refusals()},
        {"reclaims", instance.reclaims()},
        {"preempts", instance.preempts()}}},
  };
}

Json BrokerJson(const v1::BrokerStatus& broker) {
  return {
      {"version", broker.version()},
      {"backend", broker.backend()},
      {"backend_reason", broker.backend_reason()},
      {"device_uuid", broker.device_uuid()},
      {"incarnation", broker.incarnation()},
      {"pid", broker.pid()},
      {"total_bytes", broker.total_bytes()},
      {"capacity_bytes", broker.capacity_bytes()},
      {"held_bytes", broker.held_bytes()},
      {"stock_bytes", broker.stock_bytes()},
      {"sessions", broker.sessions()},
      {"uptime_seconds", broker.uptime_seconds()},
      {"state", broker.state()},
      {"others_bytes", broker.others_bytes()},
      {"foreign_bytes", broker.foreign_bytes()},
      {"declared_bytes", broker.declared_bytes()},
      {"device_error", broker.device_error()},
  };
}

Json ClaimJson(const v1::ClaimStatus& claim) {
  return {
      {"sequence", claim.sequence()},
      {"pool_id", claim.pool_id()},
      {"want_pages", claim.want_pages()},
      {"at_least_pages", claim.at_least_pages()},
      {"page_bytes", claim.page_bytes()},
      {"waiting_ms", claim.waiting_ms()},
      {"state", claim.state()},
  };
}

std::string Print(const Json& json, JsonLayout layout) {
  // A broker of another make may send what is not UTF-8; that must not throw.
  return json.dump(layout == JsonLayout::kIndented ? 2 : -1, ' ',
                   /*ensure_ascii=*/false, Json::error_handler_t::replace) +
         "\n";
}

}  // namespace

std::string ListingToJson(const Listing& listing, JsonLayout layout) {
  Json array = Json::array();
  for (const Listing::Answer& answer : listing.answers) {
    const v1::BrokerStatus& broker = answer.response.broker();
    for (const v1::InstanceStatus& instance : answer.response.instances()) {
      Json object = InstanceJson(instance, answer.device_uuid);
      object["backend"] = broker.backend();
      object["backend_reason"] = broker.backend_reason();
      object["broker_state"] = broker.state();
      object["device_error"] = broker.device_error();
      array.push_back(std::move(object));
    }
  }
  return Print(array, layout);
}

std::string BrokersToJson(const Listing& listing, JsonLayout layout) {
  Json array = Json::array();
  for (const Listing::Answer& answer : listing.answers) {
    array.push_back(BrokerJson(answer.response.broker()));
  }
  return Print(array, layout);
}

std::string ExplanationsToJson(
    const std::vector<Replies<v1::ExplainResponse>::Answer>& explanations) {
  Json array = Json::array();
  for (const auto& answer : explanations) {
    Json object = InstanceJson(answer.response.instance(), answer.device_uuid);
    object["lines"] = Json::array();
    for (const std::string& line : answer.response.lines()) {
      object["lines"].push_back(line);
    }
    object["claims"] = Json::array();
    for (const v1::ClaimStatus& claim : answer.response.claims()) {
      object["claims"].push_back(ClaimJson(claim));
    }
    array.push_back(std::move(object));
  }
  return Print(array, JsonLayout::kIndented);
}

}  // namespace kvbroker::cli
